// The PTX that Triton emits, as a Program. What is not known is a Fault that names it.
#pragma once
#include <regex>
#include <set>

#include "warp_operations.h"

namespace emulator {
inline std::string trimmed(const std::string& s) {
  size_t first = s.find_first_not_of(" \t\n"), last = s.find_last_not_of(" \t\n");
  return first == std::string::npos ? "" : s.substr(first, last - first + 1);
}
// Parts between separators that lie outside of brackets and braces.
inline std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == separator && depth == 0)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  for (std::string& part : parts) part = trimmed(part);
  if (parts.back().empty()) parts.pop_back();
  return parts;
}
inline int width_of(const std::string& type) {
  static const std::unordered_map<std::string, int> widths = {
      {"pred", 0}, {"b8", 1},  {"u8", 1},  {"s8", 1},  {"b16", 2}, {"u16", 2}, {"s16", 2}, {"f16", 2}, {"bf16", 2},
      {"b32", 4},  {"u32", 4}, {"s32", 4}, {"f32", 4}, {"b64", 8}, {"u64", 8}, {"s64", 8}, {"f64", 8}};
  auto found = widths.find(type);
  if (found == widths.end()) throw Fault{"unknown type " + type};
  return found->second;
}

class Parser {
 public:
  explicit Parser(const std::string& ptx) {
    const std::regex file("\\.file\\s+(\\d+)\\s+\"([^\"]*)\"");
    for (std::sregex_iterator at(ptx.begin(), ptx.end(), file), end; at != end; ++at)
      if (std::string name = (*at)[2]; name.size() >= 10 && name.ends_with("reports.py"))
        reports.insert(std::stoi((*at)[1]));
    header(ptx);
    body(ptx, ptx.find('{', ptx.find(".entry")));
    for (auto [at, label] : branches) {
      if (!labels.contains(label)) throw Fault{"no label " + label};
      program.code[at].immediate = labels[label];
    }
    program.register_bytes = size;
  }
  Program program;

 private:
  struct Name {
    int width, first, count;
  };
  std::unordered_map<std::string, Name> declared;  // of %r: its width, where %r0 is, and how many there are
  std::map<std::pair<int, u64>, int> constants;
  std::unordered_map<std::string, int> specials, labels, parameters;
  std::vector<std::pair<int, std::string>> branches;
  std::set<int> reports;  // files whose stores may conflict, because any of the values will do
  int size = 0;
  bool in_any_order = false;
  std::string statement;

  [[noreturn]] void unsupported() { throw Fault{"not supported by the emulator: " + statement}; }
  int allocate(int width) {
    int at = size;
    size += width == 0 ? 64 : LANES * width;
    return at;
  }

  void header(const std::string& ptx) {
    std::smatch found;
    if (!std::regex_search(ptx, found, std::regex("\\.entry\\s+([\\w$]+)\\s*\\("))) throw Fault{"no entry"};
    program.name = found[1];
    const size_t first = found.position(0) + found.length(0), last = ptx.find(')', first);
    int at = 0;
    for (const std::string& each : split(ptx.substr(first, last - first), ',')) {
      size_t name = each.rfind(' '), type = each.find('.', each.find(".param") + 1);
      int bytes = width_of(each.substr(type + 1, each.find_first_of(" \t", type) - type - 1));
      parameters[each.substr(name + 1)] = at;
      program.parameter_sizes.push_back(bytes);
      at += bytes;
    }
    const std::string limits = ptx.substr(last, ptx.find('{', last) - last);
    if (!std::regex_search(limits, found, std::regex("\\.reqntid\\s+(\\d+)"))) throw Fault{"no .reqntid"};
    program.threads = std::stoi(found[1]);
  }

  void body(const std::string& ptx, size_t from) {
    int depth = 0;
    std::string pending;
    while (from < ptx.size()) {
      size_t end = std::min(ptx.find('\n', from), ptx.size());
      std::string line = ptx.substr(from, end - from);
      from = end + 1;
      if (size_t comment = line.find("//"); comment != std::string::npos) line.resize(comment);
      line = trimmed(line);
      if (line.starts_with(".loc")) {
        in_any_order = reports.contains(std::stoi(line.substr(5)));
        continue;
      }
      if (line.starts_with(".pragma") || line.starts_with(".file")) continue;
      if (line.starts_with("$") && line.ends_with(":")) {
        labels[line.substr(0, line.size() - 1)] = int(program.code.size());
        continue;
      }
      for (char c : line) {
        // Braces around statements open a scope, within a statement a list.
        if (c == '{' && trimmed(pending).empty())
          depth++, pending.clear();
        else if (c == '}' && trimmed(pending).empty())
          depth--;
        else if (c == ';') {
          statement = trimmed(pending);
          pending.clear();
          if (statement.starts_with(".reg"))
            declare();
          else
            instruction();
        } else
          pending += c;
      }
      pending += ' ';
      if (depth == 0) return;
    }
  }

  void declare() {
    std::string rest = trimmed(statement.substr(4));
    size_t space = rest.find_first_of(" \t");
    const int width = width_of(rest.substr(1, space - 1));
    for (std::string each : split(rest.substr(space), ',')) {
      size_t many = each.find('<');
      int count = many == std::string::npos ? 1 : std::stoi(each.substr(many + 1));
      declared[each.substr(0, many)] = {width, allocate(width), count};
      for (int k = 1; k < count; k++) allocate(width);
    }
  }

  bool is_register(const std::string& text) { return text[0] == '%' || declared.contains(text); }
  // (width, place) of a register.
  std::pair<int, int> place(const std::string& text) {
    if (auto special = std::find(SPECIALS.begin(), SPECIALS.end(), text); special != SPECIALS.end()) {
      auto [at, is_new] = specials.try_emplace(text, size);
      if (is_new) program.specials.push_back({allocate(4), 4, u64(special - SPECIALS.begin())});
      return {4, at->second};
    }
    if (auto found = declared.find(text); found != declared.end()) return {found->second.width, found->second.first};
    size_t digits = text.find_last_not_of("0123456789") + 1;
    auto found = declared.find(text.substr(0, digits));
    if (found == declared.end() || digits == text.size()) unsupported();
    const auto [width, first, count] = found->second;
    const int n = std::stoi(text.substr(digits));
    if (n >= count) unsupported();
    return {width, first + n * (width == 0 ? 64 : LANES * width)};
  }
  int constant(int width, u64 value) {
    if (width && width < 8) value &= (1ull << 8 * width) - 1;
    auto [at, is_new] = constants.try_emplace({width, value}, size);
    if (is_new) program.constants.push_back({allocate(width), width, value});
    return at->second;
  }
  u64 number(const std::string& text) {
    if (text == "global_smem") return 0;
    if (text == "true" || text == "false") return text == "true";
    if (text.starts_with("0f") || text.starts_with("0d")) return std::stoull(text.substr(2), nullptr, 16);
    size_t used = 0;
    bool negative = text[0] == '-';
    u64 value = 0;
    try {
      value = std::stoull(text.substr(negative), &used, 0);
    } catch (const std::exception&) {
      unsupported();
    }
    if (used + negative < text.size() && text.substr(used + negative) != "U") unsupported();
    return negative ? 0 - value : value;
  }
  // Where an operand of this width is; `_` is nowhere.
  int operand(const std::string& text, int width) {
    if (text == "_") return -1;
    if (!is_register(text)) return constant(width, number(text));
    auto [own, at] = place(text);
    if (own != width) unsupported();
    return at;
  }
  void set(Instruction& i, int k, const std::string& text, int width) {
    i.o[k] = operand(text, width), i.widths[k] = width;
  }
  // A register keeps its own width; a number takes the given one.
  void set_any(Instruction& i, int k, const std::string& text, int width) {
    if (text != "_" && is_register(text)) width = place(text).first;
    set(i, k, text, width);
  }
  std::vector<std::string> list(const std::string& text) {
    return text[0] == '{' ? split(text.substr(1, text.rfind('}') - 1), ',') : std::vector<std::string>{text};
  }
  // Sets operand k and returns the offset of [register + offset], or of [number].
  s64 address(Instruction& i, int k, const std::string& text, int width) {
    std::string inner = trimmed(text.substr(1, text.rfind(']') - 1));
    size_t plus = inner.find('+');
    std::string base = trimmed(inner.substr(0, plus));
    set(i, k, base, width);
    return plus == std::string::npos ? 0 : s64(number(trimmed(inner.substr(plus + 1))));
  }

  void instruction() {
    Instruction i;
    i.in_any_order = in_any_order;
    std::string text = statement;
    if (text[0] == '@') {
      size_t space = text.find_first_of(" \t");
      i.negated = text[1] == '!';
      i.predicate = operand(text.substr(1 + i.negated, space - 1 - i.negated), 0);
      text = trimmed(text.substr(space));
    }
    size_t space = std::min(text.find_first_of(" \t"), text.size());
    std::string opcode = text.substr(0, space);
    if (size_t at = opcode.find("::cta"); at != std::string::npos) opcode.erase(at, 5);
    std::vector<std::string> operands = split(text.substr(space), ',');
    std::vector<std::string> words;
    for (size_t at = 0; at <= opcode.size(); at = std::min(opcode.find('.', at), opcode.size()) + 1)
      words.push_back(opcode.substr(at, opcode.find('.', at) - at));
    i.o.fill(-1);
    if (!special(i, words, operands) && !from_table(i, opcode, words, operands)) unsupported();
    program.code.push_back(i);
    program.text.push_back(statement);
  }

  bool from_table(Instruction& i, std::string opcode, const std::vector<std::string>& words,
                  std::vector<std::string> operands) {
    if (words[0] == "setp") {
      static const std::vector<std::string> joins = {"", "and", "or", "xor"};
      auto join = std::find(joins.begin() + 1, joins.end(), words.size() > 2 ? words[2] : "");
      if (join != joins.end()) {
        i.mode = int(join - joins.begin());
        opcode = words[0] + "." + words[1] + "." + words.back();
        i.flag = operands.back()[0] == '!';
        if (i.flag) operands.back().erase(0, 1);
      }
      std::vector<std::string> targets = split(operands[0], '|');
      operands[0] = targets[0];
      operands.resize(5, "_");
      if (targets.size() > 1) operands[4] = targets[1];
    }
    auto found = table().find(opcode);
    if (found == table().end() || operands.size() != found->second.widths.size()) return false;
    i.run = found->second.run;
    const int source = found->second.widths.back();
    if (words[0] == "cvt" && is_register(operands[1]) && place(operands[1]).first > source) {
      // The lower part of a register that is wider than the type.
      const int own = place(operands[1]).first;
      Instruction narrow = i;
      narrow.run = table().at(format("cvt.u%d.u%d", 8 * source, 8 * own)).run;
      narrow.o[0] = allocate(source), narrow.o[1] = operand(operands[1], own);
      program.code.push_back(narrow);
      program.text.push_back(statement);
      set(i, 0, operands[0], found->second.widths[0]);
      i.o[1] = narrow.o[0];
      return true;
    }
    for (size_t k = 0; k < operands.size(); k++) set(i, int(k), operands[k], found->second.widths[k]);
    return true;
  }

  static int index(const std::vector<std::string>& names, const std::string& name) {
    auto found = std::find(names.begin(), names.end(), name);
    return found == names.end() ? -1 : int(found - names.begin());
  }
  static bool all_of(const std::vector<std::string>& words, size_t from, std::initializer_list<const char*> known) {
    return std::all_of(words.begin() + from, words.end() - 1,
                       [&](const std::string& w) { return std::find(known.begin(), known.end(), w) != known.end(); });
  }

  // Instructions whose operands follow rules of their own.
  bool special(Instruction& i, const std::vector<std::string>& words, const std::vector<std::string>& x) {
    const std::string &name = words[0], &type = words.back();
    if (name == "bra") {
      branches.emplace_back(int(program.code.size()), x[0]);
      i.run = branch;
    } else if (name == "ret" || name == "exit")
      i.run = leave;
    else if (name == "trap")
      i.run = trap;
    else if (name == "membar" || (name == "fence" && index(words, "proxy") < 0))
      i.run = nothing;
    else if (name == "mov" && type != "pred")
      move_operands(i, type, x);
    else if (name == "ld" || name == "st")
      memory(i, words, x);
    else if (name == "cp")
      copies(i, words, x);
    else if (name == "bar" && words[1] == "warp" && number(x[0]) << 32 >> 32 == ALL)
      i.run = whole_warp;
    else if ((name == "bar" || name == "barrier") && x == std::vector<std::string>{"0"})
      i.run = barrier;
    else if (name == "shfl") {
      i.mode = index({"up", "down", "bfly", "idx"}, words[2]);
      std::vector<std::string> targets = split(x[0], '|');
      set(i, 0, targets[0], 4), set(i, 1, x[1], 4), set(i, 2, x[2], 4), set(i, 3, x[3], 4);
      if (targets.size() > 1) set(i, 4, targets[1], 0);
      if (i.mode < 0 || words[1] != "sync" || type != "b32" || u32(number(x[4])) != ALL) unsupported();
      i.run = shuffle;
    } else if (name == "redux") {
      i.mode = index(ATOMICS, words[2]), i.flag = type[0] == 's';
      set(i, 0, x[0], 4), set(i, 1, x[1], 4), set(i, 2, x[2], 4);
      if (i.mode < 0 || i.mode > XOR) unsupported();
      i.run = reduce;
    } else if (name == "atom" || name == "red")
      atomics(i, words, x);
    else if (name == "ldmatrix" || name == "stmatrix") {
      const bool loads = name == "ldmatrix";
      std::vector<std::string> registers = list(x[loads ? 0 : 1]);
      i.count = words[4][1] - '0', i.flag = index(words, "trans") >= 0;
      for (size_t k = 0; k < registers.size(); k++) set(i, int(k), registers[k], 4);
      i.immediate = address(i, 4, x[loads ? 1 : 0], 4);
      if (words[3] != "m8n8" || type != "b16" || int(registers.size()) != i.count) unsupported();
      i.run = loads ? load_matrix : store_matrix;
    } else if (name == "mma") {
      const std::vector<std::string> shapes = {"m16n8k8.row.col.f32.tf32.tf32.f32", "m16n8k16.row.col.f32.f16.f16.f32",
                                               "m16n8k16.row.col.f32.bf16.bf16.f32"};
      i.mode =
          index(shapes, statement.substr(statement.find("m16"), statement.find_first_of(" \t", statement.find("m16")) -
                                                                    statement.find("m16")));
      int k = 0;
      for (const std::string& each : x)
        for (const std::string& r : list(each)) set(i, k++, r, 4);
      if (i.mode < 0 || k != 14) unsupported();
      i.run = multiply_matrices;
    } else
      return false;
    return true;
  }

  void move_operands(Instruction& i, const std::string& type, const std::vector<std::string>& x) {
    std::vector<std::string> to = list(x[0]), from = list(x[1]);
    const int width = width_of(type);
    i.count = int(to.size()), i.mode = int(from.size());
    for (int k = 0; k < i.count; k++) set_any(i, k, to[k], width / i.count);
    for (int k = 0; k < i.mode; k++) set_any(i, i.count + k, from[k], width / i.mode);
    int bytes = 0;
    for (int k = 0; k < i.count + i.mode; k++) bytes += k < i.count ? 0 : i.widths[k];
    if (bytes != width) unsupported();
    i.run = move;
    if (i.count == 1 && i.mode == 1 && i.widths[0] == width)
      i.run = width == 2   ? Lanewise<Identity, u16, u16>::run
              : width == 4 ? Lanewise<Identity, u32, u32>::run
                           : Lanewise<Identity, u64, u64>::run;
  }
  struct Identity {
    template <class T>
    T operator()(T x) const {
      return x;
    }
  };

  void memory(Instruction& i, const std::vector<std::string>& words, const std::vector<std::string>& x) {
    const bool loads = words[0] == "ld", shared = words[1] == "shared";
    i.size = width_of(words.back());
    i.mode = words.back()[0] == 's';
    if (words[1] == "param") {
      std::string inner = trimmed(x[1].substr(1, x[1].rfind(']') - 1));
      size_t plus = inner.find('+');
      auto found = parameters.find(inner.substr(0, plus));
      if (found == parameters.end()) unsupported();
      i.immediate = found->second + (plus == std::string::npos ? 0 : s64(number(inner.substr(plus + 1))));
      set_any(i, 0, x[0], std::max(i.size, 2));
      i.run = load_parameter;
      return;
    }
    std::vector<std::string> values = list(x[loads ? 0 : 1]);
    i.count = int(values.size());
    if ((words[1] != "global" && !shared) || x.size() != 2 ||
        !all_of(words, 2,
                {"v2", "v4", "cg", "ca", "cs", "wb", "wt", "volatile", "relaxed", "gpu", "L1::evict_last",
                 "L1::evict_first", "L1::evict_normal"}))
      unsupported();
    if (i.count != (index(words, "v2") >= 0 ? 2 : index(words, "v4") >= 0 ? 4 : 1)) unsupported();
    for (int k = 0; k < i.count; k++) set_any(i, k, values[k], std::max(i.size, 2));
    i.immediate = address(i, i.count, x[loads ? 1 : 0], shared ? 4 : 8);
    i.run = loads ? (shared ? load<true> : load<false>) : (shared ? store<true> : store<false>);
  }

  void copies(Instruction& i, const std::vector<std::string>& words, const std::vector<std::string>& x) {
    if (words[1] != "async") unsupported();
    if (words[2] == "commit_group")
      i.run = commit;
    else if (words[2] == "wait_group" || words[2] == "wait_all") {
      i.run = wait, i.flag = words[2] == "wait_all";
      i.mode = i.flag ? 0 : int(number(x[0]));
    } else {
      if ((words[2] != "ca" && words[2] != "cg") || words[3] != "shared" || words[4] != "global" || words.size() != 5)
        unsupported();
      i.size = int(number(x[2]));
      if (i.size != 16 && (words[2] == "cg" || (i.size != 4 && i.size != 8))) unsupported();
      i.flag = int(address(i, 0, x[0], 4));
      i.immediate = address(i, 1, x[1], 8);
      if (x.size() > 3) set(i, 2, x[3], 4);
      i.run = copy_async;
    }
  }

  inline static const std::vector<std::string> ATOMICS = {"add", "min",  "max", "and", "or",
                                                          "xor", "exch", "cas", "inc"};
  void atomics(Instruction& i, const std::vector<std::string>& words, const std::vector<std::string>& x) {
    const size_t at = words[0] == "atom" ? 1 : 0;
    const std::string& type = words.back();
    for (const std::string& word : words) i.mode = std::max(index(ATOMICS, word), word == words[0] ? -1 : i.mode);
    i.size = width_of(type), i.flag = type[0] == 's' ? 1 : type == "f32" ? 2 : 0;
    if (at) set(i, 0, x[0], i.size);
    i.immediate = address(i, 3, x[at], 8);
    set(i, 1, x[at + 1], i.size);
    if (i.mode == CAS) set(i, 2, x[at + 2], i.size);
    if (words[1] != "global" || i.mode < 0 || i.size < 4 || (i.flag == 2 && i.mode != ADD) || type == "f64")
      unsupported();
    i.run = atomic;
  }
};
}  // namespace emulator

// Conversion between (action type, parameter) pairs and logit indices; the formula is in ops/conversion.py.

#include "checks.h"

#include <tuple>

namespace metta_fastagent {
namespace {

// Index of each row, and the first row out of range, or -1.
std::tuple<Tensor, int64_t> to_index(const Tensor& actions, const Tensor& cum_action_max_params) {
  STD_TORCH_CHECK(actions.dim() == 2 && actions.size(1) == 2, "actions: expected shape [N, 2]");
  const int64_t N = actions.size(0), step = actions.stride(0), next = actions.stride(1);
  const Integers values(actions, "actions");
  const ActionTable pairs(cum_action_max_params);
  const Tensor index = empty({N}, ScalarType::Long);
  int64_t* out = mutable_data_of<int64_t>(index);
  FirstBad bad;
  parallel(N, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t type = values.at(row * step), param = values.at(row * step + next);
      const bool legal = pairs.legal(type, param);
      if (!legal) bad.report(row);
      out[row] = legal ? pairs.index(type, param) : -1;
    }
  });
  return {index, bad.row()};
}

template <class Entry>
void copy_pairs(const Integers& index, int64_t step, const Entry* table, Entry* out, int64_t N, int64_t A,
                FirstBad& bad) {
  parallel(N, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t wanted = index.at(row * step);
      const bool legal = wanted >= 0 && wanted < A;
      if (!legal) bad.report(row);
      out[2 * row] = legal ? table[2 * wanted] : -1;
      out[2 * row + 1] = legal ? table[2 * wanted + 1] : -1;
    }
  });
}

// Pair of each row, and the first row whose index is out of range, or -1.
std::tuple<Tensor, int64_t> to_action(const Tensor& index, const Tensor& action_index_tensor) {
  STD_TORCH_CHECK(index.dim() == 1, "index: expected one dimension");
  const int64_t N = index.size(0);
  const Integers wanted(index, "index");
  const ScalarType dtype = action_index_tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long,
                  "action_index_tensor: expected int32 or int64");
  require_dense(action_index_tensor, "action_index_tensor", dtype);
  STD_TORCH_CHECK(action_index_tensor.dim() == 2 && action_index_tensor.size(1) == 2,
                  "action_index_tensor: expected shape [A, 2]");
  const int64_t A = action_index_tensor.size(0), step = index.stride(0);
  const Tensor pairs = empty({N, 2}, dtype);
  FirstBad bad;
  const auto run = [&](auto zero) {
    using Entry = decltype(zero);
    copy_pairs<Entry>(wanted, step, data_of<Entry>(action_index_tensor), mutable_data_of<Entry>(pairs), N, A,
                      bad);
  };
  dtype == ScalarType::Int ? run(int32_t{}) : run(int64_t{});
  return {pairs, bad.row()};
}

}  // namespace
}  // namespace metta_fastagent

STABLE_TORCH_LIBRARY_FRAGMENT(metta_fastagent_native, m) {
  m.def("action_to_logit_index(Tensor actions, Tensor cum_action_max_params) -> (Tensor index, int bad_row)");
  m.def("logit_index_to_action(Tensor index, Tensor action_index_tensor) -> (Tensor pairs, int bad_row)");
}

STABLE_TORCH_LIBRARY_IMPL(metta_fastagent_native, CPU, m) {
  m.impl("action_to_logit_index", TORCH_BOX(&metta_fastagent::to_index));
  m.impl("logit_index_to_action", TORCH_BOX(&metta_fastagent::to_action));
}

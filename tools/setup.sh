#!/usr/bin/env bash
# Makes or updates the virtual environment behind `make`: setup.sh PYTHON VENV EXTRAS [OPTIONAL_EXTRA]
# A torch that PYTHON imports and pyproject.toml admits is reused: a .pth file adds its folder to the environment.
# The stamp is empty until the environment is made, then "made", then the inputs and ",installed,extras,".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$1" venv="$2" extras="$3" optional="${4:-}"
stamp="$venv/setup-stamp" another="pass PYTHON=/path/to/another/python"
inputs="$(cat pyproject.toml constraints.txt tools/setup.sh | cksum) $PWD"

say() { echo "setup: $*" >&2; }
fail() { say "$@"; exit 1; }
# Whether the environment's Python finds a module, without importing it.
finds() { "$venv/bin/python" -c "import sys, importlib.util as u; sys.exit(not u.find_spec('$1'))" 2>/dev/null; }
has() { [[ "$installed" == *",$1,"* ]]; }

state="$(cat "$stamp" 2>/dev/null || true)"
installed="${state##* }"
[[ "$installed" == ,* ]] || installed=","
current=true
for extra in ${extras//,/ }; do has "$extra" || current=false; done
[[ -z "$optional" ]] || has "$optional" || has "without-$optional" || current=false
if $current && [[ "$state" == "$inputs $installed" ]] && finds pip && finds torch; then exit 0; fi

if [[ -z "$state" ]] || ! finds pip; then
  if [[ ! -e "$stamp" && -n "$(ls -A "$venv" 2>/dev/null)" ]]; then
    fail "$venv was not made by make: remove it, or pass VENV=/path/to/another/folder"
  fi
  # If the environment is activated, PYTHON is its own, which is about to be deleted.
  python="$("$python" -c "if True:
    import os, sys
    inside = os.path.realpath(sys.prefix) == os.path.realpath('$venv')
    sys.exit(1) if sys.version_info < (3, 11) else print(sys._base_executable if inside else sys.executable)" \
    2>/dev/null)" || fail "Python >= 3.11 is needed, '$1' is older or does not run: $another"
  lowest="$(sed -nE 's/.*"torch>=([0-9.]+).*/\1/p' pyproject.toml)"
  reused="$("$python" -c "if True:
    import importlib.metadata, os, torch
    fits = importlib.metadata.version('torch') and torch.__version__ >= '$lowest'
    print(os.path.dirname(os.path.dirname(torch.__file__)) if fits else '')" 2>/dev/null || true)"
  say "making $venv with $python${reused:+, reusing torch of $reused}"
  rm -rf "$venv"
  mkdir -p "$venv"
  : >"$stamp"
  output="$("$python" -m venv "$venv" 2>&1)" ||
    fail "$python -m venv failed (${output##*$'\n'}): install it (python3-venv on Debian and Ubuntu), or $another"
  packages="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  [[ -z "$reused" ]] || echo "$reused" >"$packages/reused-torch.pth"
  installed=","
fi
echo made >"$stamp"

constraints=constraints.txt
if ! finds torch; then
  [[ "$(uname)" != Linux ]] || say "WARNING: pip may fetch torch with CUDA now, several gigabytes. To avoid that, stop and" \
    "pass a PYTHON that has torch, or point pip at a CPU build (PIP_FIND_LINKS, PIP_INDEX_URL or pip.conf)."
elif compgen -G "$venv/lib/python*/site-packages/reused-torch.pth" >/dev/null; then
  version="$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')"
  if ! grep -qx "torch==${version%%+*}" constraints.txt; then
    # Pins made for another torch: its own requirements decide.
    constraints="$venv/constraints.txt"
    others="$("$venv/bin/python" -m pip show torch 2>/dev/null | sed -n 's/^Requires: //p' | sed 's/, */|/g')"
    { grep -viE "^(torch|triton|$others)==" constraints.txt; echo "torch==$version"; } >"$constraints"
  fi
fi

quiet=""
[[ -t 1 ]] || quiet="--quiet"
install() {
  PIP_USER=0 "$venv/bin/python" -m pip --disable-pip-version-check --no-input install $quiet --only-binary mettagrid \
    -c "$constraints" -e ".[$1]"
}
required="$(tr , '\n' <<<"$installed$extras" | grep -vE '^(without-.*)?$' | sort -u | paste -sd, -)"
say "installing metta_fastagent with $required${optional:+,$optional}"
if install "$required${optional:+,$optional}"; then
  installed="$required${optional:+,$optional}"
elif [[ -n "$optional" ]] && install "$required"; then
  say "WARNING: $optional did not install (see above), continuing without it"
  installed="$required,without-$optional"
else
  fail "pip failed, see above: remove the cause and run make again"
fi
echo "$inputs ,$installed," >"$stamp"

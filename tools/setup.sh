#!/usr/bin/env bash
# Makes or updates the virtual environment behind `make`: setup.sh PYTHON VENV EXTRAS [OPTIONAL_EXTRA]
# A torch that PYTHON imports and pyproject.toml admits is reused: a .pth file adds its folder to the environment.
# Lines of the stamp: inputs ("made" until pip succeeds), extras, result of the optional extra. Empty: half-made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$1" venv="$2" extras="$3" optional="${4:-}"
stamp="$venv/setup-stamp" another="pass PYTHON=/path/to/another/python"
inputs="$(cat pyproject.toml constraints.txt tools/setup.sh | cksum) $PWD"

say() { echo "setup: $*" >&2; }
fail() { say "$@"; exit 1; }
# Whether the environment's Python finds a module, without importing it.
finds() { "$venv/bin/python" -c "import sys, importlib.util as u; sys.exit(not u.find_spec('$1'))" 2>/dev/null; }

made="" had="" tried=""
[[ ! -e "$stamp" ]] || { read -r made && read -r had && read -r tried; } <"$stamp" || true
extras="$(tr , '\n' <<<"$had,$extras" | grep . | sort -u | paste -sd, -)"
[[ "$made" == "$inputs" ]] || tried=""
if [[ "$made $had" == "$inputs $extras" && "$tried" == *"$optional" ]] && finds pip && finds torch; then exit 0; fi

if [[ -z "$made" ]] || ! finds pip; then
  [[ -e "$stamp" || -z "$(ls -A "$venv" 2>/dev/null)" ]] ||
    fail "$venv was not made by make: remove it, or pass VENV=/path/to/another/folder"
  # If the environment is activated, PYTHON is its own, which is about to be deleted.
  python="$("$python" -c "if True:
    import os, sys
    inside = os.path.realpath(sys.prefix) == os.path.realpath(sys.argv[1])
    sys.exit(1) if sys.version_info < (3, 11) else print(sys._base_executable if inside else sys.executable)" \
    "$venv" 2>/dev/null)" || fail "Python >= 3.11 is needed, '$1' is older or does not run: $another"
  lowest="$(sed -nE 's/.*"torch>=([0-9.]+).*/\1/p' pyproject.toml)"
  reused="$("$python" -c "if True:
    import importlib.metadata, os, torch
    fits = importlib.metadata.version('torch') and torch.__version__ >= '$lowest'
    print(os.path.dirname(os.path.dirname(torch.__file__)) if fits else '')" 2>/dev/null || true)"
  say "making $venv with $python${reused:+, reusing torch of $reused}"
  rm -rf "$venv" && mkdir -p "$venv" && : >"$stamp"
  output="$("$python" -m venv "$venv" 2>&1)" ||
    fail "$python -m venv failed (${output##*$'\n'}): install it (python3-venv on Debian and Ubuntu), or $another"
  [[ -z "$reused" ]] || echo "$reused" >"$(echo "$venv"/lib/python*/site-packages)/reused-torch.pth"
fi
printf '%s\n' made "$had" >"$stamp"
constraints=constraints.txt
if ! finds torch; then
  say "WARNING: pip may fetch torch with CUDA now, several gigabytes. To avoid that, stop and pass a PYTHON that has" \
    "torch, or point pip at a CPU build (PIP_FIND_LINKS, PIP_INDEX_URL or pip.conf)."
elif compgen -G "$venv/lib/python*/site-packages/reused-torch.pth" >/dev/null; then
  version="$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')"
  if ! grep -qx "torch==${version%%+*}" constraints.txt; then
    # The pins suit another torch: what this one requires decides.
    constraints="$venv/constraints.txt"
    names="$("$venv/bin/python" -m pip show torch 2>/dev/null | sed -n 's/^Requires: //p' | sed 's/, */|/g')"
    { grep -viE "^(torch|triton|$names)==" constraints.txt; echo "torch==$version"; } >"$constraints"
  fi
fi
options=(--disable-pip-version-check --no-input --only-binary mettagrid -c "$constraints")
[[ -t 1 ]] || options+=(--quiet)
install() { PIP_USER=0 "$venv/bin/python" -m pip install "${options[@]}" -e ".[$1]"; }
say "installing metta_fastagent with $extras${optional:+,$optional}"
if install "$extras${optional:+,$optional}"; then
  tried="${optional:-$tried}"
elif [[ -n "$optional" ]] && install "$extras"; then
  say "WARNING: $optional did not install, see above; continuing without it"
  tried="without $optional"
else
  fail "pip failed, see above: remove the cause and run make again"
fi
printf '%s\n' "$inputs" "$extras" "$tried" >"$stamp"

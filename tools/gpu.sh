#!/usr/bin/env bash
# Checks what needs a CUDA device, without network or installation, and writes OUT/summary.md and OUT/logs.tar.gz:
#   bash tools/gpu.sh [--quick] [--only tests,bench] [--seconds 480] OUT
# versions always runs, sweep only if it is named. The limits of the stages grow with --seconds.
set -uo pipefail
fail() { echo "gpu.sh: $*" >&2; exit 2; }
stages=explain,tests,kernels,memcheck,initcheck,racecheck,training,bench
quick="" only=$stages seconds="" out="" default=480 steps=150000 failed=0 blocked=""
while (($#)); do
  case "$1" in
    --quick) quick=--quick default=300 steps=80000 ;;
    --only | --seconds) declare "${1#--}=${2:-}" && shift ;;
    -*) fail "got $1, expected [--quick] [--only STAGES] [--seconds N] OUT" ;;
    *) out="$1" ;;
  esac
  shift
done
: "${seconds:=$default}"
[[ "$seconds" =~ ^[1-9][0-9]*$ ]] || fail "--seconds: got $seconds, expected a positive integer"
for name in ${only//,/ }; do
  [[ ",versions,$stages,sweep," == *",$name,"* ]] || fail "--only: got $name, expected some of versions,$stages,sweep"
done
[[ -n "$out" && -z "$(ls -A "$out" 2>/dev/null)" ]] || fail "OUT: got '$out', expected a new or empty folder"
python="$(realpath -s "$(command -v "${PYTHON:-python3}")")" || fail "PYTHON: got ${PYTHON:-python3}, expected a Python"
mkdir -p "$out/logs" && out="$(cd "$out" && pwd)" && cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:/usr/local/cuda/bin"
printf '# GPU checks %s\n\n| stage | result | seconds | why |\n| --- | --- | ---: | --- |\n' $quick >"$out/summary.md"
wheels="bring wheels (also tensordict, pyvers), DIR on PYTHONPATH: pip install --no-index --no-deps --target DIR *.whl"

# stage NAME LIMIT "PATTERN;PATTERN" COMMAND...: passes if COMMAND exits with 0 and its log matches every pattern.
stage() {
  local name=$1 limit=$2 patterns=$3 log="$out/logs/$1.log" begun=$SECONDS result=passed why line pattern code
  [[ $name == versions || ",$only," == *",$name,"* ]] || return 0
  ((limit <= seconds - SECONDS)) || limit=$((seconds - SECONDS))
  if [[ -n "$blocked" ]] || ((limit <= 0)); then
    result=skipped why="${blocked:-the $seconds seconds are used up}"
  else
    PYTHONUNBUFFERED=1 timeout --kill-after=10 "$limit" "${@:4}" >"$log" 2>&1 </dev/null
    code=$? why="$(grep -v '^\s*$' "$log" | tail -1 | cut -c -300)"
    while ((code == 0)) && read -r -d ';' pattern; do
      line="$(grep -E "$pattern" "$log" | tail -1)"
      [[ -n "$line" ]] && why="$line" || result=failed why="no line matches '$pattern': $why"
    done <<<"$patterns;"
    if ((code == 124 || (code == 137 && SECONDS - begun >= limit))); then
      result="timed out" why="killed after $limit s: $why"
    elif ((code == 127)) || grep -q "Device not supported" "$log"; then
      result=skipped why="compute-sanitizer is missing or does not support this device"
    elif ((code)); then
      line="$(grep -oE "No module named '?[[:alnum:]_.]+'?" "$log" | tail -1)"
      result=failed why="exit status $code: ${line:-$why}${line:+; $wheels}"
    fi
  fi
  [[ $result == passed || $result == skipped ]] || failed=1
  echo "$name: $result: $why"
  echo "| $name | $result | $((SECONDS - begun)) | ${why//|/\\|} |" >>"$out/summary.md"
}
scaled() { echo $(($1 * seconds / 480)); }
stage versions 120 '"cuda": (true|false)' "$python" -m benchmarks.machine
stage explain "$(scaled 40)" . "$python" -m metta_fastagent
((failed == 0)) || blocked="an earlier stage failed"
grep -q '"cuda": false' "$out/logs/versions.log" && blocked="no CUDA device"
mapfile -t tests < <(grep -rl --include='*.py' 'mark\.gpu' tests | sed 's|/conftest.py$||' | sort)
workers=$(($(nproc) < 16 ? $(nproc) / 2 : 8))
((workers > 1)) && "$python" -c 'import xdist' 2>/dev/null && tests+=(--numprocesses "$workers")
stage tests "$(scaled 95)" '[0-9]+ passed' "$python" -m pytest -m gpu -v -p no:cacheprovider "${tests[@]}"
stage kernels "$(scaled 25)" 'launches of' "$python" -m benchmarks.launch_kernels
for tool in memcheck initcheck racecheck; do
  # Without PyTorch's allocator, an access beyond one tensor does not fall into another.
  stage $tool "$(scaled 35)" 'launches of;(ERROR|RACECHECK) SUMMARY: 0 ' env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool $tool --target-processes application-only --report-api-errors no --print-limit 20 \
    --error-exitcode 86 "$python" -m benchmarks.launch_kernels
done
stage training "$(scaled 50)" 'backend +triton;lower bound [0-9.]*[1-9]' "$python" -m metta_fastagent.train \
  --env memory --device cuda --seed 1 --steps $steps --quiet --out "$out/logs/training"
# bench and sweep share the time that is left, less 15 s for their end.
share=$(((seconds - SECONDS) / $([[ $only == *sweep* ]] && echo 2 || echo 1)))
inner=$((share > 30 ? share - 15 : share))
stage bench $share . "$python" -m benchmarks $quick --device cuda --seconds $inner --out "$out/bench"
stage sweep $share . "$python" -m benchmarks.sweep --seconds $inner --out "$out/sweep.md"
cp "$out"/logs/training/*.png "$out" 2>/dev/null
tar -C "$out" --exclude '*.pt' -czf "$out/logs.tar.gz" logs && rm -r "$out/logs"
exit $failed

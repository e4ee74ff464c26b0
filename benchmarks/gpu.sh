#!/usr/bin/env bash
# A GPU is mostly lent, by the minute: all that it can tell, in one command of at most 8 minutes and one file,
# benchmarks/results/DEVICE-DATE.json. First the tests that need a GPU. What fails or takes too long is written down, and
# the rest goes on. Uses the `python` of the PATH and no network.
#
#     bash benchmarks/gpu.sh [FOLDER]     FOLDER for the JSON file (default: benchmarks/results)
set -u
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 WANDB_MODE=disabled
python=$(command -v python || command -v python3) || { echo "there is no python in the PATH" >&2; exit 2; }
"$python" benchmarks/gpu_results.py --check || exit 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
deadline=$((SECONDS + ${MLC_GPU_SECONDS:-480}))

part() { # NAME LIMIT COMMAND...: its output goes to the terminal and, with its exit code and seconds, to $work
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  [ "$limit" -gt $((deadline - SECONDS)) ] && limit=$((deadline - SECONDS))
  if [ "$limit" -lt 5 ]; then
    code=skipped
  else
    echo "==== $name (at most $limit s)"
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$work/$name.log"
    code=${PIPESTATUS[0]}
  fi
  echo "$code $((SECONDS - begin))" >"$work/$name.ended"
}

large=swinv2_large_window12to16_192to256 base=swinv2_base_window16_256 tiny=swinv2_tiny_window8_256
run() { # NAME LIMIT SCRIPT ARGUMENTS...
  local name=$1 limit=$2 script=$3
  shift 3
  part "$name" "$limit" "$python" "benchmarks/$script.py" --json "$work/$name.json" "$@"
}

part tests 100 "$python" -m pytest -q -m gpu tests -p no:cacheprovider
run step 60 step --rounds 3 --models $large $tiny
run train_e2e 80 train_e2e --rounds 2 --steps 240
run predict 70 predict --rounds 2 --views "" "hflip,scale"
run step-compiled 110 step --rounds 3 --compile yes --models $large --modes forward step
run memory 50 memory
run step-swin 60 step --rounds 2 --models $base swin_large_patch4_window7_224 swin_base_patch4_window7_224
run scaling 50 scaling --rounds 1
"$python" benchmarks/gpu_results.py "$work" "${1:-benchmarks/results}"

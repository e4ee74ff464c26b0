#!/usr/bin/env bash
# The whole job on demo data: make it, pack it, train on two processes, stop, resume, evaluate, predict, report. Called by `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

begin=$SECONDS stage_begin=$SECONDS report=""
stage() { # stage NAME: closes the last stage, opens the next
  [ -z "${name:-}" ] || report+=$(printf '\n  %-28s %4d s' "$name" $((SECONDS - stage_begin)))
  name=$1 stage_begin=$SECONDS
  [ -z "$name" ] || printf '\n== %s\n' "$name"
}
show() { printf '$ %s\n' "$*"; "$@"; }

# accelerate_config.yaml is for two devices: two GPUs, or two processes on a CPU. One GPU takes one process.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
launch=(accelerate launch --config_file accelerate_config.yaml)
[ "$gpus" != 1 ] || launch+=(--num_processes 1)
train=("${launch[@]}" train.py -c demo --data data/demo-shards --output runs --experiment demo)

stage "demo data"
show mlc demo-data data/demo

stage "pack"
show mlc pack --csv data/demo/train.csv --images data/demo/images --test-csv data/demo/test.csv --val-fraction 0.1 --out data/demo-shards
show mlc verify data/demo-shards

if [ ! -e runs/demo/log.jsonl ]; then
  stage "train, then stop it"
  # What a pre-empted job sees: a file STOP in the run's folder (or SIGTERM) makes every process save and leave at the same step.
  (until grep -qs '"step": 150,' runs/demo/log.jsonl; do sleep 0.5; done; touch runs/demo/STOP) &
  watcher=$!
  show "${train[@]}"
  kill "$watcher" 2>/dev/null || true
fi
stage "train, resumed"
show "${train[@]}"

stage "evaluate"
show mlc eval --run runs/demo --data data/demo-shards --split val --json

stage "predict with TTA"
show "${launch[@]}" -m mlc predict --run runs/demo --data data/demo-shards --split test --tta hflip

stage "report"
show mlc report runs/demo --data data/demo-shards --out runs/demo/report.html

stage ""
printf '\nTimes:%s\n  %-28s %4d s\n' "$report" total $((SECONDS - begin))
cat <<'TEXT'

Where to look:
  runs/demo/report.html                  open it in a browser: numbers, curves, classes, what it gets wrong, where it looks
  runs/demo/predictions/val.png          validation images with what was found, missed and wrongly predicted
  runs/demo/predictions/test-submission.csv   the submission, and test.csv beside it with the probabilities
  runs/demo/summary.csv                  one line per evaluation; log.jsonl has everything
  runs/demo/best/                        weights that plain timm loads
TEXT

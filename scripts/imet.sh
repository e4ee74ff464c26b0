#!/usr/bin/env bash
# The system of the first place of iMet 2019, stage by stage. `scripts/imet.sh --help` says how; docs/imet.md what it gives.
set -euo pipefail
export PATH="$(dirname "$0")/../.venv/bin:$PATH"

usage() {
  cat <<'TEXT'
usage: scripts/imet.sh OUT [flags of mlc kfold ...]

Trains a zoo in folds and improves it as the first place of iMet 2019 did:
  1 zoo        every recipe of ZOO in all folds, out-of-fold predictions, their mean
  2 filter     images with likely wrong labels left out, the hardest 5 % twice; all models anew
  3 pseudo     the surest test images with their predicted labels added; all models anew
  4 tags       the models of stage 3 go on with the tags alone, focal loss -> cross-entropy; their answers join by group
  5 stack      a second-level model over all of these predictions, an (image, class) pair a row
Thresholds are tuned for each group on the out-of-fold predictions after each stage.

The same command goes on where it was stopped. Settings, as variables of the environment:
  DATA    packed data with folds, a split test and groups (mlc pack --folds 5 --test-csv); default: data/imet
  ZOO     recipes, at least two (default: the three of the first place)
  TRUTH   CSV with the labels of test, if they are known: every stage is scored on it
  GROUP   the group of stage 4 (tag)
  TAGS    flags of stage 4 (--epochs 5 --lr 0.001 --group-loss tag=bce)
  DROP    share of the images that stage 2 leaves out (0.05)
  SURE    share of the test images that stage 3 adds (0.5)
  TTA     views in predictions (hflip)

examples:
  mlc pack --csv train.csv --images images --test-csv test.csv --folds 5 --out data/imet
  scripts/imet.sh runs/imet --launch gpu2
  DATA=data/demo-imet ZOO="demo-imet demo-imet-csra" TTA= scripts/imet.sh runs/imet --pretrained-path lite0.safetensors --jobs 2
TEXT
}

case ${1:-} in
  "" ) usage >&2; exit 2 ;;
  -h | --help) usage; exit ;;
  -*) echo "error: the first argument is the folder to write, not $1 (see scripts/imet.sh --help)" >&2; exit 2 ;;
esac
OUT=$1 FLAGS=("${@:2}")
DATA=${DATA:-data/imet} GROUP=${GROUP:-tag} DROP=${DROP:-0.05} SURE=${SURE:-0.5} TTA=${TTA-hflip} TRUTH=${TRUTH:-}
read -ra ZOO <<<"${ZOO:-imet-first-place-seresnext101 imet-first-place-senet154 imet-first-place-pnasnet5}"
read -ra TAGS <<<"${TAGS:---epochs 5 --lr 0.001 --group-loss $GROUP=bce}"
[ ${#ZOO[@]} -gt 1 ] || { echo "error: ZOO=${ZOO[*]}: name at least two recipes" >&2; exit 2; }

once() { # once FILE COMMAND...: nothing where the file is there already; every verb writes its files whole
  [ -e "$1" ] || { printf '$ %s\n' "${*:2}"; "${@:2}"; }
}

zoo() { # zoo STAGE FLAGS...: every recipe in all folds, and the mean of their answers; {recipe} in a flag is its name
  local recipe stage=$1 flags=("${@:2}") parts=() submitted=""
  for recipe in "${ZOO[@]}"; do
    parts+=("$OUT/$stage-$recipe-kfold")
    once "${parts[-1]}/test.csv" mlc kfold -c "$recipe" --data "$DATA" --output "$OUT" --experiment "$stage-$recipe" \
      --predict test --weights last --tta "$TTA" "${FLAGS[@]}" "${flags[@]//\{recipe\}/$recipe}"
    [ -e "${parts[-1]}/test.csv" ] || submitted=yes # by --slurm
  done
  [ -z "$submitted" ] || { echo "stage $stage is submitted; the same command goes on when it has finished" >&2; exit; }
  once "$OUT/$stage/oof.csv" mlc ensemble "${parts[@]/%//oof.csv}" --out "$OUT/$stage/oof.csv"
  once "$OUT/$stage/test.csv" mlc ensemble "${parts[@]/%//test.csv}" --out "$OUT/$stage/test.csv"
}

decide() { # decide STAGE: thresholds for each group, and what they are worth
  local rule="$OUT/$1/thresholds.json" scores="$OUT/$1/scores.json"
  once "$rule" mlc tune "$OUT/$1/oof.csv" --data "$DATA" --split train --metric f2_samples --rule group --out "$rule"
  if [ -n "$TRUTH" ] && [ ! -e "$scores" ]; then
    printf '$ mlc eval %s --json > %s\n' "$OUT/$1/test.csv $TRUTH --threshold $rule" "$scores"
    mlc eval "$OUT/$1/test.csv" "$TRUTH" --threshold "$rule" --json >"$scores.part"
    mv "$scores.part" "$scores"
  fi
}

# ---- 1: the zoo
zoo 1-zoo
decide 1-zoo

# ---- 2: without likely wrong labels, and the hardest samples twice
once "$OUT/1-zoo/noise/drop.csv" mlc noise "$OUT/1-zoo/oof.csv" --data "$DATA" --drop "$DROP" --out "$OUT/1-zoo/noise"
zoo 2-filter --drop-rows "$OUT/1-zoo/noise/drop.csv" --hard-mining 0.05
decide 2-filter

# ---- 3: the surest test images, with the label sets that are best for F1
once "$OUT/2-filter/f1.json" mlc tune "$OUT/2-filter/oof.csv" --data "$DATA" --split train --rule group --out "$OUT/2-filter/f1.json"
once "$OUT/2-filter/test.pseudo.arrow" mlc pseudo "$OUT/2-filter/test.csv" --data "$DATA" --share "$SURE" \
  --threshold "$OUT/2-filter/f1.json"
zoo 3-pseudo --drop-rows "$OUT/1-zoo/noise/drop.csv" --data "pseudo:$OUT/2-filter/test.pseudo.arrow"
decide 3-pseudo

# ---- 4: the models of stage 3 go on with the tags alone, and are asked for them alone
zoo 4-tags-alone --drop-rows "$OUT/1-zoo/noise/drop.csv" --groups "$GROUP" "${TAGS[@]}" \
  --no-pretrained --pretrained-path "$OUT/3-pseudo-{recipe}-fold{fold}/last"
once "$OUT/4-tags/oof-weights.json" mlc ensemble "$OUT/3-pseudo/oof.csv" "$OUT/4-tags-alone/oof.csv" --weights "1,0;$GROUP=0,1" \
  --data "$DATA" --split train --metric f2_samples --out "$OUT/4-tags/oof.csv"
once "$OUT/4-tags/test.csv" mlc ensemble "$OUT/3-pseudo/test.csv" "$OUT/4-tags-alone/test.csv" \
  --weights "$OUT/4-tags/oof-weights.json" --out "$OUT/4-tags/test.csv"
decide 4-tags

# ---- 5: a second level
members=()
for stage in 1-zoo 2-filter 3-pseudo; do members+=("${ZOO[@]/#/$OUT/$stage-}"); done
members=("${members[@]/%/-kfold}" "$OUT/4-tags")
once "$OUT/5-stack/test.csv" mlc stack "${members[@]/%//oof.csv}" --test "${members[@]/%//test.csv}" --data "$DATA" --out "$OUT/5-stack"
decide 5-stack

once "$OUT/test-submission.csv" mlc ensemble --vote "$OUT/5-stack/test.csv" --threshold "$OUT/5-stack/thresholds.json" \
  --data "$DATA" --split test --out "$OUT/test-submission.csv"
python "$(dirname "$0")/imet_table.py" "$OUT"

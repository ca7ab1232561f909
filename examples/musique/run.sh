#!/usr/bin/env bash
# A whole SoLo-DPO run on two CPU processes: data, reference pass, training with TP=2 (and sequence
# parallelism), the same with CP=2, and the proof that both are the same computation.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1

work=examples/musique/work
config=examples/musique/config.yaml
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
launch() { torchrun --standalone --nproc-per-node 2 -m megatron_solopo "$@"; }

# Only what this script makes; runs of your own in the same folder stay.
rm -rf "$work"/{tp2,cp2,reference,prepared,triplets.jsonl,triplets.report}
say "1. A tokenizer trained on the example's text, and a tiny random-weight Qwen2 model"
python examples/musique/make_tokenizer_and_model.py --output $work/model

say "2. Short and long contexts around the same evidence"
megatron-solopo data build --input examples/musique/musique.jsonl --output $work/triplets.jsonl \
    --tokenizer $work/model --short-distractors 1 --long-tokens 2048 --responses constructed
megatron-solopo data prepare --input $work/triplets.jsonl --output $work/prepared \
    --tokenizer $work/model --eval-count 16

say "3. SoLo-DPO on two processes, TP=2 with sequence parallelism (starts at ln 2 = 0.6931)"
launch train --config $config run_dir=$work/tp2 reference.cache=$work/reference

say "4. The same with CP=2, on the reference log-probs that TP=2 computed"
launch train --config $config run_dir=$work/cp2 reference.cache=$work/reference \
    parallel.tensor_model_parallel_size=1 parallel.context_parallel_size=2

say "5. The same losses?"
python -m tools.checks.compare_losses $work/tp2 $work/cp2 --tolerance 1e-2
say "Look at $work/tp2: metrics.png, metrics.jsonl, config.yaml, checkpoints/ and TensorBoard events."

#!/usr/bin/env bash
# SoLoPO in minutes on two CPU cores: a model that fails on long contexts, its own answers to short ones, training over
# two processes, a Hugging Face directory, and accuracy against length before and after.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1

work=examples/reproduction/work/quickstart
miniature() { python examples/reproduction/quickstart.py "$@"; }
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# Only what this script makes; runs of your own in the same folder stay.
rm -rf "$work"
say "1. A small Llama learns to look facts up in contexts of 16 to 32 words, from scratch"
miniature base --output $work/base

say "2. Its own answers to short contexts, right and wrong ones, become preference pairs"
miniature contexts --output $work/contexts.jsonl
megatron-solopo data sample --contexts $work/contexts.jsonl --output $work/responses.jsonl \
    --model $work/base --num-samples 16 --samples-per-request 16 --max-tokens 2 --temperature 1.5
megatron-solopo data select --contexts $work/contexts.jsonl --responses $work/responses.jsonl \
    --output $work/triplets.jsonl --tokenizer $work/base --score token_f1
megatron-solopo data prepare --input $work/triplets.jsonl --output $work/prepared --tokenizer $work/base

say "3. SoLo-SimPO on two processes, CP=2: pairs on 16 words, the right answer's reward carried over to 128"
torchrun --standalone --nproc-per-node 2 -m megatron_solopo train --config examples/reproduction/config.yaml

say "4. Back to Hugging Face"
megatron-solopo convert export --checkpoint $work/run/checkpoints/iter_0000100 --out $work/aligned

say "5. Accuracy against length, before and after"
miniature questions --output $work/questions.jsonl
for model in base aligned; do
    megatron-solopo evaluate long-context --model $work/$model --contexts $work/questions.jsonl --side long \
        --lengths 18,34,66,130,258,514,1026 --batch-size 64 --output $work/evaluation/$model.json
done
say "6. What it brought"
miniature compare $work/evaluation/base.json $work/evaluation/aligned.json --output $work/accuracy.png
miniature ask $work/base $work/aligned
say "Look at $work/accuracy.png, at $work/run (metrics.png, metrics.jsonl, config.yaml), and load $work/aligned."

#!/usr/bin/env bash
# SoLoPO in minutes on two CPU cores. A small model fails on long contexts. Pairs of its own answers to short contexts
# train it over two processes. The script then compares its accuracy on long contexts before and after.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1

work=examples/reproduction/work/quickstart
config=examples/reproduction/config.yaml
miniature() { python examples/reproduction/quickstart.py "$@"; }
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
# The details of a command are of use only if something fails.
log() { "$@" >> $work/log.txt || { cat $work/log.txt; return 1; }; }

# The script removes only its own files; your runs in the same folder stay.
rm -rf "$work"
say "1. Train a small Llama from scratch: it finds facts in contexts of 16 to 32 words"
miniature base --output $work/base

say "2. Let it answer short contexts, and make preference pairs of right and wrong answers"
miniature contexts --output $work/contexts.jsonl
log megatron-solopo data sample --contexts $work/contexts.jsonl --output $work/responses.jsonl \
    --model $work/base --num-samples 16 --samples-per-request 16 --max-tokens 2 --temperature 1.5
log megatron-solopo data select --contexts $work/contexts.jsonl --responses $work/responses.jsonl \
    --output $work/triplets.jsonl --tokenizer $work/base --score token_f1
log megatron-solopo data prepare --input $work/triplets.jsonl --output $work/prepared --tokenizer $work/base
echo "$(wc -l < $work/triplets.jsonl) triplets: $work/triplets.jsonl"

say "3. Train with SoLoPO on two processes: pairs on 16 words, rewards aligned to 128 words"
torchrun --standalone --nproc-per-node 2 -m megatron_solopo train --config $config

say "4. Convert the checkpoint to Hugging Face, and ask both models questions on 16 to 1,024 words"
log megatron-solopo convert export --checkpoint $work/run/checkpoints/iter_0000100 --out $work/aligned
miniature questions --output $work/questions.jsonl
for model in base aligned; do
    log megatron-solopo evaluate long-context --model $work/$model --contexts $work/questions.jsonl --side long \
        --lengths 18,34,66,130,258,514,1026 --batch-size 64 --output $work/evaluation/$model.json
done
miniature ask $work/base $work/aligned

say "5. Share of right answers, before and after"
miniature compare $work/evaluation/base.json $work/evaluation/aligned.json --output $work/accuracy.png

say "Try next"
cat << END
The usual method, which trains on the long contexts:
    torchrun --standalone --nproc-per-node 2 -m megatron_solopo train --config $config \\
        objective.name=long_po run_dir=$work/long_po
A page that compares both runs:
    megatron-solopo report $work/run $work/long_po --output $work/report
The same on real text:
    make musique
END

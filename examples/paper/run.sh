#!/usr/bin/env bash
# One row of the paper's tables, from the corpus to the scores:
#     examples/paper/run.sh ROW [MODEL]        python examples/paper/paper_rows.py lists the rows
# Every stage continues where it stopped. Rows with the same data share it. Training and evaluation are jobs of SLURM
# where it is installed. With SLURM= (empty) they run here. The README says what must be there before.
set -euo pipefail
cd "$(dirname "$0")/../.."

row=${1:?a row} model=${2:-qwen2.5-7b}
: "${MUSIQUE:=data/musique_ans_v1.0_train.jsonl}"       # the corpus
: "${QUESTIONS:=10000}"                                 # questions of it, drawn at random, that the model is asked
: "${SERVER:=http://localhost:8000/v1}"                 # serves the base model under the name SERVED
: "${SERVED:=$model}"
: "${MAX_LENGTH:=32768}" "${RULER_LENGTHS:=[4096, 8192, 16384, 32768]}"
: "${GROUPS_OF_TASKS:=ruler longbench longbench2 leaderboard}"
: "${GPUS_PER_NODE:=8}" "${SLURM=$(command -v sbatch || true)}"

pairs='' short_tokens='' long_tokens='' answer_room='' triplets='' data='' weights='' overrides=()
settings=$(python examples/paper/paper_rows.py "$row" "$model")
eval "$settings"
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
# Lines of a file in an order that depends on nothing but the file.
draw() { shuf --random-source=<(yes) -n "$1" "$2"; }

if [[ $pairs ]]; then
    contexts=${data%/*}/contexts-${data##*-}.jsonl
    questions=data/paper/questions-$QUESTIONS.jsonl
    mkdir -p "$data"
    say "1. Contexts: $contexts"
    if [[ ! -f $questions ]]; then
        draw "$QUESTIONS" "$MUSIQUE" >"$questions.part"
        mv "$questions.part" "$questions"
    fi
    [[ -f $contexts ]] || megatron-solopo data build --input "$questions" --output "$contexts" --tokenizer "$weights" \
        --template chat --short-tokens "$short_tokens" --long-tokens "$long_tokens" --response-tokens "$answer_room" \
        --num-proc "$(nproc)"

    if [[ ! -d $data/prepared ]]; then
        say "2. Answers to the $pairs contexts, and $triplets triplets of them: $data"
        megatron-solopo data sample --contexts "$contexts" --output "$data/responses.jsonl" --side "$pairs" \
            --num-samples 32 --temperature 0.85 --server "$SERVER" --model "$SERVED"
        megatron-solopo data select --contexts "$contexts" --responses "$data/responses.jsonl" \
            --output "$data/all.jsonl" --tokenizer "$weights" --score sub_em --overwrite
        found=$(wc -l <"$data/all.jsonl")
        ((found >= triplets)) || { echo "$found triplets, not $triplets: raise QUESTIONS=$QUESTIONS" >&2 && exit 1; }
        draw "$triplets" "$data/all.jsonl" >"$data/triplets.jsonl"
        megatron-solopo data prepare --input "$data/triplets.jsonl" --output "$data/prepared" --tokenizer "$weights"
    fi

    run=runs/paper/$model/$row exported=exports/paper/$model/$row
    if [[ ! -d $exported ]]; then
        say "3. Training: $run"
        train=(examples/paper/"$model".yaml "${overrides[@]}")
        if [[ $SLURM ]]; then
            sbatch --wait --job-name "$row" examples/slurm/single-node.sbatch "${train[@]}"
        else
            python -m megatron_solopo.launch --nproc-per-node "$GPUS_PER_NODE" -m megatron_solopo train --config "${train[@]}"
        fi
        say "4. Export: $exported"
        megatron-solopo convert export --checkpoint "$run/checkpoints/$(<"$run/checkpoints/latest")" --out "$exported" \
            --verify tensors
    fi
    weights=$exported
fi

# Their options and what their scores mean: examples/evaluation/README.md.
evaluate() {
    local group=$1 output=results/paper/$model/$row/$1 options=() job=()
    compgen -G "$output/**/results_*.json" >/dev/null && return
    case $group in
    ruler) options=(--tasks "ruler_qa_squad,ruler_qa_hotpot" --metadata "{\"max_seq_lengths\": $RULER_LENGTHS}") ;;
    longbench) options=(--tasks "longbench_single,longbench_multi") ;;
    leaderboard) options=(--tasks leaderboard --fewshot_as_multiturn) ;;
    *) options=(--tasks "$group") ;;
    esac
    [[ -z $SLURM ]] || job=(srun --gpus=1 --job-name "$row-$group")
    "${job[@]}" lm_eval run --model hf --model_args "pretrained=$weights,dtype=bfloat16,max_length=$MAX_LENGTH" \
        "${options[@]}" --batch_size 1 --apply_chat_template --output_path "$output" --log_samples
}
for group in $GROUPS_OF_TASKS; do
    say "5. Evaluation of $weights: $group"
    evaluate "$group"
done
say "6. The table: examples/paper/RESULTS.md"
python examples/paper/make_results.py

#!/usr/bin/env bash
# One row of the paper's tables, from the corpus to the scores:
#     examples/paper/run.sh ROW [MODEL]        python examples/paper/paper_rows.py lists the rows
# Every stage continues where it stopped. Rows with the same data share it. Training and evaluation are jobs of SLURM
# where it is installed. With SLURM= (empty) they run here. The README says what must be there before.
set -euo pipefail
cd "$(dirname "$0")/../.."

row=${1:?"name a row: examples/paper/run.sh ROW [MODEL]; python examples/paper/paper_rows.py lists the rows"}
model=${2:-qwen2.5-7b}
: "${MUSIQUE:=data/musique_ans_v1.0_train.jsonl}"       # the corpus
: "${QUESTIONS:=10000}"                                 # questions of it, drawn at random, that the model is asked
: "${SERVER:=http://localhost:8000/v1}"                 # serves the base model under the name SERVED
: "${SERVED:=$model}"
: "${RULER_LENGTHS:=[4096, 8192, 16384, 32768]}"
: "${MAX_LENGTH:=33024}"                                # the longest of them, and 256 tokens of the chat template
: "${GROUPS_OF_TASKS=ruler longbench longbench2 leaderboard}"   # empty: no evaluation
: "${GPUS_PER_NODE:=8}" "${SLURM=$(command -v sbatch || true)}"

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
fail() { echo "error: $*; see examples/paper/README.md" >&2 && exit 1; }
# Lines of a file in an order that depends on nothing but the file.
draw() { shuf --random-source=<(yes) -n "$1" "$2"; }

pairs='' short_tokens='' long_tokens='' answer_room='' triplets='' data='' weights='' overrides=()
settings=$(python examples/paper/paper_rows.py "$row" "$model")
eval "$settings"
[[ -d $weights ]] || fail "no model in $weights"
[[ -z $GROUPS_OF_TASKS ]] || command -v lm_eval >/dev/null || fail "lm_eval is not installed"

make_data() {
    local lines drawn questions responses contexts served found
    [[ -f $MUSIQUE ]] || fail "no corpus in MUSIQUE=$MUSIQUE"
    lines=$(grep -c '' "$MUSIQUE") || true
    ((lines >= QUESTIONS)) || fail "MUSIQUE=$MUSIQUE holds $lines questions, fewer than QUESTIONS=$QUESTIONS"
    # Other questions have other distractors, so another corpus or number of questions has files of its own.
    drawn=$QUESTIONS-of-$(sha256sum "$MUSIQUE" | head -c 8)
    questions=data/paper/questions-$drawn.jsonl responses=$data/responses-$drawn.jsonl
    contexts=${data%/*}/contexts-${data##*-}-$drawn.jsonl
    served=$(curl --silent --show-error --max-time 20 "$SERVER/models") || true
    [[ $served == *"\"$SERVED\""* ]] || fail "SERVER=$SERVER does not serve SERVED=$SERVED"

    say "1. Contexts: $contexts"
    if [[ ! -f $questions ]]; then
        # A row of another model may draw the same questions now.
        draw "$QUESTIONS" "$MUSIQUE" >"$questions.$model.part"
        mv "$questions.$model.part" "$questions"
    fi
    [[ -f $contexts ]] || megatron-solopo data build --input "$questions" --output "$contexts" --tokenizer "$weights" \
        --template chat --short-tokens "$short_tokens" --long-tokens "$long_tokens" --response-tokens "$answer_room" \
        --num-proc "$(nproc)"

    say "2. Answers to the $pairs contexts, and $triplets triplets of them: $data"
    megatron-solopo data sample --contexts "$contexts" --output "$responses" --side "$pairs" \
        --num-samples 32 --temperature 0.85 --server "$SERVER" --model "$SERVED"
    megatron-solopo data select --contexts "$contexts" --responses "$responses" \
        --output "$data/all.jsonl" --tokenizer "$weights" --score sub_em --overwrite
    found=$(wc -l <"$data/all.jsonl")
    ((found >= triplets)) || fail "$found triplets, not $triplets: raise QUESTIONS=$QUESTIONS"
    draw "$triplets" "$data/all.jsonl" >"$data/triplets.jsonl"
    megatron-solopo data prepare --input "$data/triplets.jsonl" --output "$data/prepared" --tokenizer "$weights"
}

if [[ $pairs ]]; then
    mkdir -p "$data"
    exec 9>"${data%/*}/lock"
    flock --nonblock 9 || { say "Another row makes data of $model: waiting for it" && flock 9; }
    [[ -d $data/prepared ]] || make_data
    exec 9>&-

    run=runs/paper/$model/$row exported=exports/paper/$model/$row
    if [[ ! -d $exported ]]; then
        say "3. Training: $run"
        train=(examples/paper/"$model".yaml "${overrides[@]}")
        if [[ $SLURM ]]; then
            # A job of an earlier start may still train this row: of one name, SLURM starts one after the other.
            sbatch --wait --job-name "paper-$model-$row" --dependency=singleton examples/slurm/single-node.sbatch \
                "${train[@]}"
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
if [[ $GROUPS_OF_TASKS ]]; then
    say "6. The table: examples/paper/RESULTS.md"
    python examples/paper/make_results.py
fi

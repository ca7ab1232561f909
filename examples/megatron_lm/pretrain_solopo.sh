#!/usr/bin/env bash
# SoLoPO under Megatron-LM's pretrain(): Qwen2.5-7B on one node of eight GPUs, TP 4 x CP 2.
#
#     examples/megatron_lm/pretrain_solopo.sh MODEL_DIR PREPARED_DIR REFERENCE_DIR OUTPUT_DIR [ARGUMENT ...]
#
# MODEL_DIR: Hugging Face directory or Megatron checkpoint; PREPARED_DIR: of `megatron-solopo data prepare`;
# REFERENCE_DIR: the cache that `megatron-solopo reference` writes. PYTHONPATH must hold your Megatron-LM. Started again,
# it continues from the latest checkpoint in OUTPUT_DIR. Arguments at the end go to Megatron-LM.
set -euo pipefail

model=${1:?MODEL_DIR} data=${2:?PREPARED_DIR} reference=${3:?REFERENCE_DIR} output=${4:?OUTPUT_DIR}
shift 4
export CUDA_DEVICE_MAX_CONNECTIONS=1
# torch would read the older name alone if both were set.
[[ -n ${PYTORCH_ALLOC_CONF:-} ]] || export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

MODEL=( # as MODEL_DIR/config.json has it, which is checked
    --num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944 --num-attention-heads 28
    --group-query-attention --num-query-groups 4 --add-qkv-bias --disable-bias-linear --swiglu
    --normalization RMSNorm --norm-epsilon 1e-6 --untie-embeddings-and-output-weights
    --position-embedding-type rope --seq-length 32768 --max-position-embeddings 32768
    --tokenizer-type NullTokenizer --vocab-size 152064 # tokens come from PREPARED_DIR
    --transformer-impl transformer_engine --bf16
)
LAYOUT=(
    --tensor-model-parallel-size 4 --sequence-parallel --context-parallel-size 2
    --use-distributed-optimizer
)
TRAINING=(
    --global-batch-size 64 --micro-batch-size 4 # 64 triplets a step, 16 packs of 4 on the average
    --train-iters 1000 --lr 1e-6 --min-lr 0 --lr-warmup-iters 10 --lr-decay-style cosine
    --weight-decay 0 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --seed 1234
    --eval-interval 100 --eval-iters 1 --log-interval 1
    --save "$output" --load "$output" --save-interval 100 --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable
)
REQUIRED=( # or packs of triplets are refused
    --calculate-per-token-loss --dataloader-type external --hidden-dropout 0 --attention-dropout 0
)
SOLOPO=(
    --solopo-model-path "$model" --solopo-data-path "$data" --solopo-reference-cache "$reference"
    --solopo-max-tokens-per-pack 163840 --solopo-objective solopo --solopo-loss-type dpo
)

torchrun --nproc-per-node "${GPUS_PER_NODE:-8}" "$(dirname "$0")/pretrain_solopo.py" \
    "${MODEL[@]}" "${LAYOUT[@]}" "${TRAINING[@]}" "${REQUIRED[@]}" "${SOLOPO[@]}" "$@"

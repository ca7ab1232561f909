#!/usr/bin/env bash
# Every check and measurement that needs a GPU, in under nine minutes on one H200; without a GPU, the same at toy size.
#
#     tools/checks/gpu_checks.sh OUTPUT [PART ...]
#
# Parts (all by default): tests acceptance trl mfu fp8 128k. Each is bounded by a time limit, a failure does not stop
# the next one, and each leaves a JSON file and a log in OUTPUT. PYTHON names the interpreter (python3). On a machine
# without a network, WHEELS="FILE.whl ..." are installed to a temporary folder first. TESTS names the files of tests
# (tests/gpu). SIZES=toy takes toy sizes on a GPU, too, and no time limits: the rehearsal of docs/guides/emulated-gpu.md.
set -uo pipefail

output=$(realpath -m "${1:?usage: tools/checks/gpu_checks.sh OUTPUT [PART ...]}")
shift
parts=("$@")
[[ ${#parts[@]} -gt 0 ]] || parts=(tests acceptance trl mfu fp8 128k)
cd "$(dirname "$0")/../.." || exit 1
mkdir -p "$output"
PYTHON=${PYTHON:-python3} TESTS=${TESTS:-tests/gpu} SIZES=${SIZES:-full}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=()

if [[ -n ${WHEELS:-} ]]; then
    # shellcheck disable=SC2086 # a list of files
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" $WHEELS || exit 1
    PYTHONPATH=$scratch/site:$PYTHONPATH
fi

# `part NAME SECONDS COMMAND...`: its output goes to NAME.log, its last lines to the terminal.
part() {
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    printf '\n=== %s ===\n' "$name"
    [[ $SIZES != toy ]] || limit=0 # none
    timeout "$limit" "$@" >"$output/$name.log" 2>&1 || code=$?
    tail -n 40 "$output/$name.log"
    [[ $code -eq 0 ]] || failed+=("$name (exit code $code)")
    printf -- '--- %s: %d s, exit code %d\n' "$name" $((SECONDS - start)) "$code"
}

benchmark() { # NAME SECONDS ARGUMENTS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" -m tools.benchmarks.benchmark --json "$output/$name.json" --plot "$output/$name.png" "$@"
}

# Which test did what, from pytest's report to tests.json.
tests_to_json='
import json, sys
from xml.etree import ElementTree

cases = []
for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
    outcomes = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
    told = [child.text for child in case if child.tag == "system-out"]
    outcome = outcomes[0] if outcomes else "passed"
    cases.append({"test": case.get("name"), "outcome": outcome, "seconds": float(case.get("time")), "told": told})
json.dump(cases, open(sys.argv[2], "w"), indent=2)
'

# The tokenizer of the example, under a model that is wide enough for FP8.
wide_model='
import shutil, sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

small, wide, layers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
config = Qwen2Config.from_pretrained(small)
widths = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": layers}
config.update(widths | {"layer_types": ["full_attention"] * layers, "max_position_embeddings": 8192})
torch.manual_seed(0)
Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(wide)
for file in small.glob("*token*"):
    shutil.copy(file, wide)
'

run_tests() {
    # shellcheck disable=SC2086 # a list of files
    part tests 200 "$PYTHON" -m pytest $TESTS -rA -p no:cacheprovider --junitxml "$scratch/tests.xml"
    "$PYTHON" -c "$tests_to_json" "$scratch/tests.xml" "$output/tests.json"
}

run_acceptance() {
    local small=$scratch/small data=(--tokenizer "$scratch/small")
    part acceptance-model 60 "$PYTHON" examples/musique/make_tokenizer_and_model.py --output "$small"
    part acceptance-wide 60 "$PYTHON" -c "$wide_model" "$small" "$scratch/wide" "$layers"
    part acceptance-build 60 "$PYTHON" -m megatron_solopo data build --input examples/musique/musique.jsonl \
        --output "$scratch/triplets.jsonl" --responses constructed \
        --short-distractors 0 --long-tokens "$context" "${data[@]}"
    part acceptance-prepare 60 "$PYTHON" -m megatron_solopo data prepare --input "$scratch/triplets.jsonl" \
        --output "$scratch/prepared" "${data[@]}"
    printf '%s\n' "run_dir: $scratch/run" "model: {path: $scratch/wide, dtype: $dtype}" \
        "data: {path: $scratch/prepared, max_tokens_per_pack: 32768}" "training: {global_batch_size: 4}" \
        "optimizer: {lr: 1.0e-5}" >"$scratch/config.yaml"
    part acceptance 120 "$PYTHON" -m tools.checks.fp8_acceptance --config "$scratch/config.yaml" \
        --output "$output/acceptance" --triplets "$triplets" --steps "$steps" "$candidate"
}

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    dtype=bfloat16 candidate=model.fp8=e4m3 # blockwise is the default
    offload=(optimizer.optimizer_offload_fraction=0.7)
    declare -A fp8=([blockwise]=e4m3 [tensorwise]=hybrid)
else
    echo "no CUDA device: toy sizes, no FP8, no offload"
    SIZES=toy
    dtype=float32 candidate=model.dtype=bfloat16
    offload=()
    declare -A fp8=()
fi
if [[ $SIZES == toy ]]; then
    small=tiny large=tiny fewer=2 lengths=(128 256) long=256 longest=512 short=64 response=16
    layers=2 triplets=4 steps=1 context=1024
else
    small=qwen2.5-1.5b large=qwen2.5-7b fewer=8 lengths=(8192 32768) long=32768 longest=131072 short=1024 response=512
    layers=8 triplets=64 steps=10 context=4096
fi
sizes=(--short-tokens "$short" --response-tokens "$response")
full=(parallel.recompute_granularity=full)

for name in "${parts[@]}"; do
    case $name in
        tests) run_tests ;;
        acceptance) run_acceptance ;;
        # Against TRL, both in the fastest form that the memory allows.
        trl) benchmark trl 200 --shape "$small" "${lengths[@]/#/--long-tokens=}" "${sizes[@]}" --steps 3 \
            --fallback "${full[*]}" ;;
        # Utilization: as few layers as fit without any recomputation; where the time goes.
        mfu) benchmark mfu 100 --shape "$large" --layers "$fewer" --long-tokens "$long" "${sizes[@]}" --steps 3 \
            --systems solopo,long_po --profile "$output/profile" ;;
        fp8) for recipe in blockwise tensorwise; do
            benchmark "fp8-$recipe" 100 --shape "$large" --layers "$fewer" --long-tokens "$long" "${sizes[@]}" --steps 3 \
                --systems solopo ${fp8[$recipe]:+"model.fp8=${fp8[$recipe]}"} "model.fp8_recipe=$recipe"
        done ;;
        # The whole 7B shape at 128K on one GPU.
        128k) benchmark 128k 240 --shape "$large" --long-tokens "$longest" "${sizes[@]}" --warmup 1 --steps 1 \
            --systems solopo "${full[@]}" "${offload[@]}" ;;
        *) echo "unknown part $name: tests acceptance trl mfu fp8 128k" >&2; exit 2 ;;
    esac
done

printf '\n%d s; results in %s\n' "$SECONDS" "$output"
if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi

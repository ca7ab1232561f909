"""A mixture of experts through every command of README, each in processes of its own, with a rank killed in training.

What the commands say of the trained model is compared with transformers, which loads what the last one exports.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.files import read_jsonl
from tests.data.tiny_tokenizers import write_hugging_face
from tests.parity import plain
from tests.tiny_models import ROUTER, make_model
from tests.train.console import ROOT

STEPS, SAVED = 40, 5
TOKENS = {"vocab_size": 400, "max_position_embeddings": 2048}
COMMAND = ("-m", "megatron_solopo")
TWO_RANKS = ("-m", "megatron_solopo.launch", "--standalone", "--nproc-per-node", "2", *COMMAND)
RIVERS = ("Po", "Arno", "Tiber", "Adige", "Oglio", "Tanaro")
CITIES = ("Turin", "Florence", "Rome", "Verona", "Brescia", "Asti")


def write_triplets(path: Path) -> Path:
    facts = [f"The river {river} crosses {city}." for river, city in zip(RIVERS, CITIES, strict=True)]
    rows = [
        {
            "id": f"{city}-{other}",
            "prompt_short": f"{facts[number]} Which river crosses {city}?",
            "prompt_long": f"{' '.join(facts)} Which river crosses {city}?",
            "chosen": f"The answer is: {RIVERS[number]}",
            "rejected": f"The answer is: {RIVERS[number - other]}",
        }
        for number, city in enumerate(CITIES)
        for other in (1, 2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(folder: Path) -> Path:
    config = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "imported"), "dtype": "float32"},
        "data": {"path": str(folder / "prepared"), "max_tokens_per_pack": 1000},
        "training": {"global_batch_size": 2, "max_steps": STEPS},
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1},
        "checkpoint": {"save_steps": SAVED},
        "logging": {"tensorboard": False},
        "parallel": {"expert_model_parallel_size": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*side_by_side: tuple[object, ...]) -> list[str]:
    """What each command prints. All must end well."""
    started = [start(*COMMAND, *arguments) for arguments in side_by_side]
    try:
        printed = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), printed
    return [output for output, _ in printed]


def kill_a_rank(launcher: subprocess.Popen[str], metrics: Path) -> None:
    """`kill -9` of rank 1, once the run is past its first checkpoint."""
    until = time.monotonic() + 600
    while launcher.poll() is None and time.monotonic() < until:
        if metrics.is_file() and len(read_jsonl(metrics)) > SAVED + 2:
            for rank in psutil.Process(launcher.pid).children():
                if rank.environ().get("RANK") == "1":
                    rank.kill()
                    return
        time.sleep(0.02)


@pytest.mark.timeout(900)  # under a minute and a half of one core on an idle machine
def test_a_mixture_of_experts_goes_through_every_command(tmp_path: Path) -> None:
    folder = tmp_path
    model = make_model(folder / "model", "qwen3_moe", num_hidden_layers=2, **TOKENS)
    write_hugging_face(model, vocab_size=TOKENS["vocab_size"])
    triplets, config, trained = write_triplets(folder / "triplets.jsonl"), write_config(folder), folder / "run"
    prepare = ("data", "prepare", "--input", triplets, "--tokenizer", model, "--output", folder / "prepared")
    run(
        ("convert", "import", "--hf", model, "--out", folder / "imported", "--verify", "tensors"),
        (*prepare, "--eval-count", 4),
    )

    launcher = start(*TWO_RANKS, "train", "--config", config)
    kill_a_rank(launcher, trained / "metrics.jsonl")
    said, errors = launcher.communicate(timeout=600)
    assert launcher.returncode == 128 + signal.SIGKILL and "continues from the newest checkpoint" in errors, errors
    assert "DP 2, experts: EP 2 x TP 1 |" in said
    shared = read_jsonl(trained / "metrics.jsonl")
    _, planned = run(
        ("train", "--config", config, "parallel.expert_model_parallel_size=1"),
        ("plan", "--config", config, "--gpus", 2, "--gpu", "h100", "--explain", "ep=2"),
    )
    assert "parallel.expert_model_parallel_size=2" in planned
    alone = read_jsonl(trained / "metrics.jsonl")
    assert [step["step"] for step in alone] == list(range(1, STEPS + 1)) and SAVED < len(shared) < STEPS
    for one, other in zip(shared, alone, strict=False):
        names = ("loss", "moe/load_max_over_mean", "moe/entropy", "moe/route_agreement")
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-5)
    assert {step["num_processes"] for step in alone[len(shared) :]} == {1}
    assert (trained / "metrics.png").read_bytes().startswith(b"\x89PNG")

    newest = trained / "checkpoints" / f"iter_{STEPS:07d}"
    run(
        ("evaluate", "preference", "--model", trained),
        (
            *("evaluate", "long-context", "--model", trained, "--tasks", "needle_single", "--lengths", 700),
            *("--samples", 2, "--depths", 0.5, "--max-new-tokens", 4),
        ),
        ("convert", "export", "--checkpoint", newest, "--out", folder / "exported", "--verify", "none"),
    )
    compared, _ = run(
        ("convert", "verify", "--hf", folder / "exported", "--checkpoint", newest),
        ("report", trained, "--output", folder / "report"),
    )
    assert "bitwise equal" in compared and "greatest relative error" in compared
    assert (folder / "report" / "experts.png").is_file()
    assert (trained / "evaluation" / f"long_context-iter_{STEPS:07d}.json").is_file()
    compare_with_transformers(folder, newest.name)


def compare_with_transformers(folder: Path, checkpoint: str) -> None:
    """Weights were trained, but routers; every log-probability of the evaluation is that of the export."""
    before, after = plain.parameters(folder / "model"), plain.parameters(folder / "exported")
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    routers = {name for name in before if name.endswith(ROUTER)}
    # An expert that no token was sent to stays, too.
    assert routers <= same and len(same) < len(before) / 2 and all(".experts." in name for name in same - routers)
    model = plain.load(folder / "exported")
    rows = load_prepared(folder / "prepared").eval
    assert rows is not None
    found = read_jsonl(folder / "run" / "evaluation" / f"preference-{checkpoint}.jsonl")
    assert [line["id"] for line in found] == rows["id"][:]
    for row, line in zip(rows, found, strict=True):
        for context in ("short", "long"):
            for answer in ("chosen", "rejected"):
                with torch.no_grad():
                    expected = plain.response_logprob(model, row[f"prompt_{context}"], row[answer]).item()
                assert line[f"logps/{answer}_{context}"] == pytest.approx(expected, rel=1e-4)

"""Whole runs of the console script, in processes of their own: only there does the interpreter end as a user's does."""

import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_solopo import exits
from megatron_solopo.files import read_jsonl
from tests.prepared import make_prepared
from tests.tiny_models import make_model

ROOT = Path(__file__).parents[2]
# What pip makes of an entry point; written anew, so that this tree runs and not what was installed last.
_SCRIPT = """
import sys
from {module} import {function}
if __name__ == "__main__":
    sys.exit({function}())
"""
_PATIENCE_SECONDS = 240


def make_inputs(folder: Path) -> Path:
    """The script, a tiny model and 16 triplets."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, function = scripts["megatron-solopo"].split(":")
    (folder / "megatron-solopo").write_text(_SCRIPT.format(module=module, function=function))
    make_model(folder / "model", "qwen2_tied", seed=0)
    make_prepared(folder / "prepared", rows=16, eval_count=0, seed=0)
    (folder / "config.yaml").write_text(
        f"run_dir: {folder}/run\n"
        f"model: {{path: {folder}/model}}\n"
        f"data: {{path: {folder}/prepared, max_tokens_per_pack: 200}}\n"
        "objective: {loss_type: simpo}\n"
        "training: {global_batch_size: 8}\n"
    )
    return folder


def exit_codes(folder: Path, expected: int, count: int, *, side_by_side: int) -> list[int]:
    """The codes of `count` runs that should end with `expected`; `side_by_side` at once, which loads the machine."""
    run = {0: _to_the_end, exits.STOPPED: _stopped, exits.HUNG: _hung}[expected]
    with ThreadPoolExecutor(side_by_side) as pool:
        return list(pool.map(lambda number: run(folder, f"run_{expected}_{number}"), range(count)))


def _to_the_end(folder: Path, name: str) -> int:
    return _code(_start(folder, name))


def _stopped(folder: Path, name: str) -> int:
    """SIGTERM comes after the first step."""
    process = _start(folder, name, ["training.max_steps=100000"])
    metrics = folder / name / "metrics.jsonl"
    until = time.monotonic() + _PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < until:
        if metrics.is_file() and read_jsonl(metrics):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    return _code(process)


def _hung(folder: Path, name: str) -> int:
    """The main thread opens a pipe that nobody reads where it writes its metrics."""
    (folder / name).mkdir()
    os.mkfifo(folder / name / "metrics.jsonl")
    return _code(_start(folder, name, ["watchdog.start_timeout_minutes=0.2"]))


def _start(folder: Path, name: str, overrides: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        folder / "megatron-solopo",
        "train",
        "--config",
        folder / "config.yaml",
        f"run_dir={folder / name}",
        *overrides,
    ]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _code(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(_PATIENCE_SECONDS)
    finally:
        process.kill()
        process.wait()

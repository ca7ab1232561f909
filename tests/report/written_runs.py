"""Run directories as `train` and `evaluate` leave them, from formulas: no training needed."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from megatron_solopo.results.long_context import LongContextResults, ScoreCell
from megatron_solopo.results.preference import PreferenceResults

LENGTHS = (1024, 2048, 4096, 8192, 16384)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def write_run(path: Path, *, steps: int = 120, max_steps: int | None = 120, seed: int = 0, **config: Any) -> Path:
    """A run whose loss falls; its config has `training.max_steps`, and `config` as sections."""
    path.mkdir(parents=True)
    sections = {
        "run_dir": str(path),
        "seed": seed,
        "model": {"path": "models/base"},
        "training": {"global_batch_size": 8, "max_steps": max_steps},
        **config,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(sections))
    lines = [json.dumps(step_line(step, seed)) + "\n" for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(lines))
    return path


def step_line(step: int, seed: int, **changes: Any) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    noise = random.Random(1000 * seed + step).gauss(0, 0.04)
    fallen = 1 - math.exp(-step / (30 + 10 * seed))
    line = {
        "step": step,
        "loss": 0.69 - 0.4 * fallen + noise,
        "po_loss": 0.69 - 0.45 * fallen + noise,
        "solo_ra/loss": 0.05 * fallen,
        "solo_ra/gap_abs": 0.3 * fallen * math.exp(-step / 60) + abs(noise),
        "solo_ra/gap_signed": 0.2 * fallen * math.exp(-step / 60) + noise,
        "rewards/chosen": 0.5 * fallen + noise,
        "rewards/chosen_long": 0.4 * fallen + noise,
        "rewards/rejected": -0.9 * fallen + noise,
        "rewards/accuracies": min(1.0, max(0.0, 0.5 + 0.4 * fallen + noise)),
        "grad_norm": 3 - 2 * fallen + 5 * abs(noise),
        "learning_rate": 1e-6 * (1 - step / 200),
        "num_tokens": 90_000,
        "flops": 4.1e15,
        "step_time": 2.5,
        "num_processes": 8,
        "tokens_per_second": 36_000 * (1 + noise),
        "mfu": None,
        "peak_memory_bytes": 42 * 2**30,
        "straggler_rank": 6 if step % 5 == 0 else 3,
        "straggler_share": 0.04,
    }
    if step % 40 == 0:
        line |= {"eval_loss": line["loss"] + 0.03, "eval_rewards/accuracies": line["rewards/accuracies"] - 0.02}
    return line | changes


def write_answers(run: Path, *, skill: float, step: int | None, tasks: tuple[str, ...] = ("niah_single",)) -> Path:
    """Results of `evaluate long-context`: right up to 1,024 tokens, then worse by `skill`."""
    cells = [
        cell(task, accuracy(skill, length, depth), length, depth, 20)
        for task in tasks
        for length in LENGTHS
        for depth in DEPTHS
    ]
    cells += [cell(task, accuracy(skill, length, 0.5), length, None, 100) for task in tasks for length in LENGTHS]
    results = LongContextResults(
        name="long-context", model=f"{run}/checkpoints/{step}" if step else "models/base", backend="megatron",
        run_dir=str(run) if step else None, step=step, main_metrics=dict.fromkeys(tasks, "string_match_all"),
        lengths=list(LENGTHS), depths=list(DEPTHS), cells=cells, skipped=[], max_positions=16384, samples=500,
        prompt_tokens=1, generated_tokens=1, seconds=1.0, layout={}, device="cpu", created="2026-01-01T00:00:00+00:00",
        version="0", command="test", settings={},
    )  # fmt: skip
    path = run / "evaluation" / f"long-context-{step}.json"
    results.write(path)
    return path


def accuracy(skill: float, length: int, depth: float) -> float:
    """Falls with the length, most in the middle."""
    lost = math.log2(length / 1024) * (1 - skill) / 4
    return round(max(0.0, 0.97 - lost * (1.15 - abs(depth - 0.5))), 4)


def cell(task: str, score: float, length: int, depth: float | None, n: int) -> ScoreCell:
    half = 1.96 * math.sqrt(max(score * (1 - score), 0.01) / n)
    return ScoreCell(
        task=task, metric="string_match_all", length=length, depth=depth, n=n, score=score, low=max(0.0, score - half),
        high=min(1.0, score + half), interval="wilson", prompt_tokens=1, generated_tokens=1, seconds=1.0,
    )  # fmt: skip


def write_preferences(run: Path, *, skill: float, step: int | None) -> Path:
    """Results of `evaluate preference`."""
    whole = preference_group(skill, 8192, 400)
    results = PreferenceResults(
        name=f"preference-{step}", model=f"{run}/{step}" if step else "models/base", run_dir=str(run) if step else None,
        step=step, data="prepared", data_fingerprint="f", split="eval", loss_type="dpo", beta=0.1, precision="bfloat16",
        reference="models/base", layout={}, created="2026-01-01T00:00:00+00:00", version="0", command="test",
        overall=whole,
        by_length=[{"above": each // 2, "up_to": each, **preference_group(skill, each, 80)} for each in LENGTHS],
        by_depth=[{"start": start, "end": start + 0.2, **preference_group(skill, 8192, 80)} for start in (0.0, 0.4)],
        by_length_and_depth=[
            {"above": length // 2, "up_to": length, "start": start, "end": start + 0.2,
             **preference_group(skill, length, 16)}
            for length in LENGTHS
            for start in (0.0, 0.2, 0.4, 0.6, 0.8)
        ],
    )  # fmt: skip
    path = run / "evaluation" / f"preference-{step}.json"
    results.write(path)
    return path


def preference_group(skill: float, length: int, n: int) -> dict[str, Any]:
    def estimate(mean: float, half: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - half, "high": mean + half}

    right = accuracy(skill, length, 0.5)
    metrics = {
        "rewards/accuracies_long": estimate(right, 0.04),
        "rewards/accuracies_short": estimate(0.93, 0.03),
        "solo_ra/gap_abs": estimate(0.4 * (1 - skill), 0.02),
    }
    return {"n": n, "ties_short": 0, "ties_long": 0, "metrics": metrics}

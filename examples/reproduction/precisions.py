"""The miniature in several precisions: errors at the start, and accuracy after SoLoPO.

\b
It needs the bases and pairs of `reproduce.py --only dpo-solopo-both`. FP8 needs a GPU, or the emulated kernels:
  PYTHONPATH=tests/emulated_gpu/site:.:.venv312-transformer-engine OMP_NUM_THREADS=1 \\
      .venv312/bin/python examples/reproduction/precisions.py --work examples/reproduction/work
With EMULATED_GPU=blackwell before it, it measures mxfp8, which other devices do not have.
Stopped and started again, it goes on. It appends to WORK/precisions.jsonl, prints its tables and draws
WORK/precisions.png.
"""

import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from megatron_solopo.checkpoint.conversion import export_model
from megatron_solopo.checkpoint.load import global_parameters
from megatron_solopo.config import Config
from megatron_solopo.errors import UserError
from megatron_solopo.files import read_jsonl, remove
from megatron_solopo.model.resolve import check_precision, resolve_model
from megatron_solopo.parallel import topology as process_groups
from megatron_solopo.train.policy import build_policy
from megatron_solopo.train.scoring import score_sequences
from megatron_solopo.train.session import check_and_join
from megatron_solopo.train.trainer import train
from miniature.figures import draw_precisions
from miniature.plan import DEFAULT_ALPHA, LOSS_TYPES, SEEDS, STRONG
from miniature.rescaled import write_rescaled
from miniature.results import spread
from miniature.runs import STEPS, Run, base_directory, data_directory, make_config, measure
from tools.checks.fp8_acceptance import response_lengths
from tools.checks.precision_runs import first_gradient, raw_gaps, root_mean_square
from tools.reporting import table

HERE = Path(__file__).parent
_TE = {"dtype": "bfloat16", "implementation": "transformer_engine"}
PRECISIONS: Mapping[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32", "implementation": "local"},
    "bf16": _TE,
    **{
        f"{recipe} {fp8}": _TE | {"fp8": fp8, "fp8_recipe": recipe}
        for recipe in ("blockwise", "tensorwise", "delayed", "mxfp8")
        for fp8 in ("e4m3", "hybrid")
    },
}
_TRIPLETS = 64
_AT_START = {
    "logp_error": "log-prob error",
    "gap_error_simpo": "gap error, SimPO",
    "gap_error_orpo": "gap error, ORPO",
    "gap_flips_simpo": "wrong signs, SimPO",
    "gap_flips_orpo": "wrong signs, ORPO",
    "cosine_simpo": "cosine, SimPO",
    "cosine_dpo": "cosine, DPO",
    "cosine_orpo": "cosine, ORPO",
}
"""Columns of the first table. A DPO reward is a constant times the log-prob, and so is SimPO's for answers of one
length: the gap errors of the two are equal."""
_LENGTHS = ("16", "64", "128", "512")


@click.command(help=__doc__)
@click.option("--work", default=HERE / "work", type=click.Path(path_type=Path), help="What reproduce.py wrote.")
@click.option("--seed", "seeds", type=int, multiple=True, default=SEEDS, show_default=True)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(list(PRECISIONS)),
    multiple=True,
    default=PRECISIONS,
    show_default="all that this device computes",
    help="fp32, which all are compared with, comes first in any case.",
)
@click.option("--steps", default=STEPS, show_default=True, help="Of training; 0 measures the start alone.")
@click.option(
    "--rescaled",
    type=click.IntRange(0),
    default=0,
    help="Measure this many more models of each seed, which compute the same with other roundings: the start alone.",
)
def main(work: Path, seeds: tuple[int, ...], precisions: tuple[str, ...], steps: int, rescaled: int) -> None:
    others = work / "rescaled"
    if rescaled:
        measure_all(others, [*rescale_bases(work, seeds, rescaled)], precisions, 0)
    else:
        measure_all(work, seeds, precisions, steps)
    lines, other_lines = _lines(work), _lines(others)
    click.echo(start_table(other_lines if rescaled else lines))
    if steps and not rescaled:
        click.echo("\n" + trained_table(lines, steps))
    draw_precisions(
        [line for line in lines if not line["steps"]], other_lines, list(PRECISIONS), work / "precisions.png"
    )


def _lines(work: Path) -> list[dict[str, Any]]:
    path = work / "precisions.jsonl"
    return list(read_jsonl(path)) if path.exists() else []


def rescale_bases(work: Path, seeds: Sequence[int], count: int) -> Iterator[int]:
    """Write rescaled bases beside copies of their pairs. Yields the number of each, which stands for its seed."""
    for seed, number in product(seeds, range(1, count + 1)):
        name = 100 * number + seed
        target = work / "rescaled"
        if not base_directory(target, STRONG, name).is_dir():
            pairs = data_directory(target, STRONG, name)
            shutil.copytree(data_directory(work, STRONG, seed), pairs, dirs_exist_ok=True)
            write_rescaled(base_directory(work, STRONG, seed), base_directory(target, STRONG, name), name)
        yield name


def measure_all(work: Path, seeds: Sequence[int], precisions: Sequence[str], steps: int) -> None:
    """Append what is missing to WORK/precisions.jsonl."""
    path = work / "precisions.jsonl"
    done = {(line["steps"], line["precision"], line["seed"]) for line in _lines(work)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    asked = dict.fromkeys(("fp32", *precisions))
    missing = [key for key in product(sorted({0, steps}), asked, seeds) if key not in done]
    refused = {each for each in asked if any(key[1] == each for key in missing) and refuses(work, seeds[0], each)}
    for number, precision, seed in missing:
        if precision not in refused:
            started = time.monotonic()
            found = {"steps": number, "precision": precision, "seed": seed, "device": device}
            found |= after_training(work, seed, precision, steps) if number else at_start(work, seed, precision)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(found | {"seconds": round(time.monotonic() - started, 1)}) + "\n")


def refuses(work: Path, seed: int, precision: str) -> bool:
    """Whether this device cannot compute it; then a line says why."""
    config = config_of(work, seed, "simpo", precision)
    process_groups.prepare_device(config.parallel)
    try:
        check_precision(resolve_model(config.model, config.parallel), config.optimizer)
    except UserError as error:
        click.echo(f"{precision} is left out: {error}", err=True)
        return True
    return False


def config_of(work: Path, seed: int, loss_type: str, precision: str, align: str = "both") -> Config:
    """The strong base's SoLoPO run of the reproduction, in another precision."""
    config = make_config(work, Run(STRONG, seed, "solopo", loss_type, DEFAULT_ALPHA[loss_type], align))
    folder = f"{loss_type}-{precision.replace(' ', '-')}-seed{seed}"
    return config.model_copy(
        update={
            "run_dir": work / "precisions" / folder,
            "model": config.model.model_copy(update=PRECISIONS[precision]),
            "training": config.training.model_copy(update={"try_largest_pack": False}),
        }
    )


def at_start(work: Path, seed: int, precision: str) -> dict[str, Any]:
    """Against fp32, before the first step: log-probs per token, reward gaps and their signs, and gradients."""
    exact_path = data_directory(work, STRONG, seed) / "fp32.pt"
    logps_TR, lengths_TR, gradients = _score(work, seed, precision)
    if precision == "fp32":
        torch.save((logps_TR, gradients), exact_path)
    exact_TR, exact_gradients = torch.load(exact_path)
    found: dict[str, Any] = {"logp_error": float(((logps_TR - exact_TR) / lengths_TR).abs().mean())}
    for loss_type in LOSS_TYPES:
        objective = config_of(work, seed, loss_type, precision).objective
        gaps, exact = (raw_gaps(objective, each, lengths_TR) for each in (logps_TR, exact_TR))
        found[f"gap_size_{loss_type}"] = root_mean_square(exact)
        found[f"gap_error_{loss_type}"] = root_mean_square(gaps - exact) / root_mean_square(exact)
        found[f"gap_flips_{loss_type}"] = float((gaps.sign() != exact.sign()).double().mean())
        pairs = [(gradients[loss_type][name], exact_gradients[loss_type][name]) for name in gradients[loss_type]]
        found[f"cosine_{loss_type}"] = _cosine(pairs)
    return found


def _cosine(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    ours, theirs = (torch.cat([each[side].flatten().double() for each in pairs]) for side in (0, 1))
    return float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))


def _score(work: Path, seed: int, precision: str) -> tuple[Tensor, Tensor, dict[str, dict[str, Tensor]]]:
    """Log-probs and lengths `[T, R]` of the first triplets, and the first batch's gradients by loss type and name."""
    configs = {loss_type: config_of(work, seed, loss_type, precision) for loss_type in LOSS_TYPES}
    config = configs["dpo"]
    _, topology, (source,) = check_and_join(config)
    datasets = source.datasets
    try:
        train_split = datasets.by_split["train"].head(_TRIPLETS)
        datasets = replace(datasets, by_split={"train": train_split})
        policy = build_policy(config, resolve_model(config.model, config.parallel), topology, STEPS)
        scores = score_sequences(config, policy.chunks, train_split, topology, precision)
        gradients = {}
        for loss_type, each in configs.items():
            references = scores if each.objective.needs_reference else None
            found = first_gradient(each, policy, datasets, topology, references)
            names = {id(weight): name for name, weight in global_parameters(policy.chunks[0].module)}
            order = [names[id(weight)] for weight in policy.chunks[0].parameters()]
            gradients[loss_type] = dict(zip(order, found, strict=True))
        return scores.logps, response_lengths(train_split, config.objective.roles.all), gradients
    finally:
        process_groups.destroy(topology)


def after_training(work: Path, seed: int, precision: str, steps: int) -> dict[str, Any]:
    """Accuracy of SoLo-SimPO's model by length of the context, measured by transformers in fp32 on the CPU."""
    config = config_of(work, seed, "simpo", precision, "chosen")
    config = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": steps})})
    remove(config.run_dir)
    train(config)
    exported = config.run_dir / "exported"
    export_model(config.run_dir / "checkpoints" / f"iter_{steps:07}", exported, dtype=None, verification="tensors")
    gaps = [step["solo_ra/gap_abs"] for step in read_jsonl(config.run_dir / "metrics.jsonl")[-10:]]
    found = {"accuracy": measure(exported), "last_gap": statistics.mean(gaps)}
    remove(exported)
    remove(config.run_dir / "checkpoints")
    return found


def start_table(lines: Sequence[dict[str, Any]]) -> str:
    """What `at_start` found: mean over the models, and standard deviation."""
    cells = [
        [precision, str(len(rows)), *(spread((row[name] for row in rows), digits=4) for name in _AT_START)]
        for precision in PRECISIONS
        if precision != "fp32" and (rows := _rows(lines, 0, precision))
    ]
    return table(("precision", "models", *_AT_START.values()), cells)


def trained_table(lines: Sequence[dict[str, Any]], steps: int) -> str:
    """What `after_training` found. The difference to fp32 is taken seed by seed, over all lengths."""
    exact = {row["seed"]: _mean_accuracy(row) for row in _rows(lines, steps, "fp32")}
    cells = []
    for precision in PRECISIONS:
        if rows := _rows(lines, steps, precision):
            cells.append([precision, str(len(rows))])
            cells[-1] += [spread(row["accuracy"][length] for row in rows) for length in _LENGTHS]
            cells[-1] += [spread((_mean_accuracy(row) - exact[row["seed"]] for row in rows), digits=3)]
            cells[-1] += [spread((row["last_gap"] for row in rows), digits=3)]
    return table(("precision", "models", *(f"{each} words" for each in _LENGTHS), "mean, less fp32", "last gap"), cells)


def _rows(lines: Sequence[dict[str, Any]], steps: int, precision: str) -> list[dict[str, Any]]:
    return [line for line in lines if (line["steps"], line["precision"]) == (steps, precision)]


def _mean_accuracy(line: dict[str, Any]) -> float:
    """Over all lengths."""
    return statistics.mean(line["accuracy"].values())


if __name__ == "__main__":
    main()

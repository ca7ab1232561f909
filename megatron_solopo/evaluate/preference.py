"""Preferences on held-out triplets: does a model rank the right answer first, in the short and in the long context?

1. Compute the log-probability of both answers behind both contexts, with one forward pass per role, under any layout.
2. Turn them into rewards by the run's loss type, against its reference model if the loss type needs one.
3. Write accuracies, margins and gaps by length and depth of the evidence (.json), a line per triplet (.jsonl) and a
   picture (.png).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.config import Config, MoEConfig, ObjectiveConfig, OptimizerConfig, Role
from megatron_solopo.data.batch_plan import IntArray
from megatron_solopo.data.loader import TripletDataset
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.rewards import TripletColumn, summarise_groups, triplet_columns
from megatron_solopo.files import atomic_path, check_writable, sha256_json
from megatron_solopo.model.resolve import ResolvedModel
from megatron_solopo.parallel import topology as process_groups
from megatron_solopo.parallel.agreement import on_rank_0
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.report.evaluation_pictures import draw_preference
from megatron_solopo.results.preference import PreferenceResults, read_preference
from megatron_solopo.results.results_file import EVALUATION_FOLDER, origin
from megatron_solopo.run_directory import Subject
from megatron_solopo.train.policy import load_frozen
from megatron_solopo.train.reference import reference_dependencies, reference_logprobs
from megatron_solopo.train.run_data import RunDatasets
from megatron_solopo.train.scoring import check_finite, score_sequences
from megatron_solopo.train.session import check_and_join, warn_about_dtype
from megatron_solopo.train.step import ReferenceLogprobs

Split = Literal["train", "eval"]
_SHOWN = 5


def evaluate_preference(subject: Subject, config: Config, *, split: Split, output: Path) -> PreferenceResults:
    """Evaluate on all ranks together; rank 0 writes `output` and, beside it, `.jsonl` and `.png`.

    Args:
        subject: The model that is evaluated.
        config: Names data, objective, reference model, precision and layout.
        output: Ends in .json. It is replaced if it holds an earlier evaluation of the same model and data.

    Returns the content of the file, on every rank.

    Raises UserError for a config, data or output that do not fit, or rewards that are not finite.
    """
    settings = _evaluation_config(subject, config, split)
    warn_about_dtype(settings)
    model, topology, (source,) = check_and_join(settings)
    datasets = source.datasets
    dataset = datasets.by_split[split]
    try:
        on_rank_0(lambda: _check_output(output, settings, datasets.manifest.fingerprint, split))
        logps, references = _score(settings, model, replace(datasets, by_split={split: dataset}), split, topology)
        is_writer, data_parallel_size = dist.get_rank() == 0, topology.data_group.size()
    finally:
        process_groups.destroy(topology)
    lengths = {role: dataset.counted_lengths(role.response) for role in logps.roles}
    columns = triplet_columns(
        settings.objective, _by_role(logps), lengths, None if references is None else _by_role(references)
    )
    _check_finite(columns, dataset, subject, settings.objective)
    tokens, depths = _tokens(dataset, logps.roles), dataset.evidence_depths()
    results = PreferenceResults(
        name=output.stem,
        model=str(subject.path),
        run_dir=None if subject.run_dir is None else str(subject.run_dir),
        step=subject.step,
        data=str(config.data.directory),
        data_fingerprint=datasets.manifest.fingerprint,
        split=split,
        loss_type=settings.objective.loss_type,
        beta=settings.objective.beta,
        precision=settings.model.dtype,
        reference=_reference_model(settings),
        layout=_layout(settings, data_parallel_size),
        **origin(),
        **summarise_groups(columns, list(tokens.values())[-1], depths),
    )
    if is_writer:
        _write(output, results, dataset, tokens, columns, depths)
    return results


def _evaluation_config(subject: Subject, config: Config, split: Split) -> Config:
    """The config to score `subject` with: both answers behind both contexts, and the reference model of `config`.

    The reference reads the same contexts, and every token has the same weight, so that runs compare.

    Raises UserError if the data have no such split.
    """
    prepared = load_prepared(config.data.directory)
    if prepared.manifest.kind == "instruction":
        raise UserError(f"{config.data.path}: holds instructions, whose one response is compared with nothing")
    if split == "eval" and prepared.eval is None:
        raise UserError(
            f"{config.data.path}: has no held-out split; prepare it with --eval-count, or take all its rows with "
            "--split train"
        )
    objective = {"name": "solopo", "align": "both"} if prepared.manifest.kind == "triplet" else {"name": "short_po"}
    reference = {"model_path": config.reference.model_path or config.model.path, "context": None}
    return config.model_copy(
        update={
            "run_dir": subject.run_dir or config.run_dir,
            "model": config.model.model_copy(update={"path": subject.path}),
            # Responses are scored one by one, so that their numbers do not depend on each other.
            "data": config.data.model_copy(update={"share_prompts": False}),
            "objective": config.objective.model_copy(update=objective | {"ld_alpha": None}),
            "reference": config.reference.model_copy(update=reference),
            "training": config.training.model_copy(update={"eval_steps": None}),
            "optimizer": OptimizerConfig(),  # nothing is optimized
            "moe": MoEConfig(),  # the model as it is, which replays no routes
        }
    )


def default_output(subject: Subject, config: Config) -> Path:
    """`RUN/evaluation/preference-CHECKPOINT.json`, in the run of the model, or of the config for a model of no run."""
    return (subject.run_dir or config.run_dir) / EVALUATION_FOLDER / f"preference-{subject.name}.json"


def _check_output(path: Path, config: Config, fingerprint: str, split: Split) -> None:
    """Raise UserError if the file cannot be written, or if it holds another evaluation, which would be lost."""
    if path.suffix != ".json":
        raise UserError(f"--output {path}: must end in .json")
    check_writable(path.parent, "--output")
    if not path.exists():
        return
    found, objective, reference = read_preference(path), config.objective, _reference_model(config)
    both: dict[str, tuple[object, object]] = {
        "model": (Path(found.model).resolve(), config.model.path.resolve()),
        "data": (found.data_fingerprint, fingerprint),
        "split": (found.split, split),
        "loss type": (f"{found.loss_type}, beta {found.beta}", f"{objective.loss_type}, beta {objective.beta}"),
        "precision": (found.precision, config.model.dtype),
    }
    if None not in (found.reference, reference):
        both["reference model"] = (found.reference, reference)
    others = [f"{name} ({old}, now {new})" for name, (old, new) in both.items() if old != new]
    if others:
        raise UserError(
            f"{path}: holds an evaluation of another {', '.join(others)}, which would be lost; set --output"
        )


def _reference_model(config: Config) -> str | None:
    return str(config.reference.model_path) if config.objective.needs_reference else None


def _layout(config: Config, data_parallel_size: int) -> dict[str, int]:
    parallel = config.parallel
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    sizes = {name: getattr(parallel, name) for name in names} | {"data_parallel_size": data_parallel_size}
    return sizes | parallel.expert_sizes


def _score(
    config: Config, model: ResolvedModel, datasets: RunDatasets, split: str, topology: Topology
) -> tuple[ReferenceLogprobs, ReferenceLogprobs | None]:
    """Log-probabilities of the model, and of the reference model where rewards need it."""
    references = None
    if config.objective.needs_reference:
        # The name depends on everything that decides the numbers. So the checkpoints of a run share a cache, and no
        # cache is ever out of date.
        digest = sha256_json(reference_dependencies(config, model, datasets))[:12]
        cache = config.run_dir / EVALUATION_FOLDER / f"reference-{split}-{digest}"
        cached = config.model_copy(update={"reference": config.reference.model_copy(update={"cache": cache})})
        references = reference_logprobs(cached, model, datasets, topology, separate_roles=True)[split]
    chunks = load_frozen(model, topology, chunk_tokens=config.logprob.chunk_tokens)
    dataset = datasets.by_split[split]
    logps = score_sequences(config, chunks, dataset, topology, "evaluation", separate_roles=True)
    check_finite(logps, dataset, f"the model {model.path}", config.model.dtype)
    return logps, references


def _by_role(logprobs: ReferenceLogprobs) -> dict[Role, Tensor]:
    return dict(zip(logprobs.roles, logprobs.logps.unbind(dim=1), strict=True))


def _check_finite(
    columns: Mapping[str, TripletColumn], dataset: TripletDataset, subject: Subject, objective: ObjectiveConfig
) -> None:
    broken = np.flatnonzero(~np.all([np.isfinite(values) for values in columns.values()], axis=0))
    if len(broken):
        raise UserError(
            f"{subject.path}: rewards of {len(broken)} triplets are not finite, first "
            f"{', '.join(dataset.named_ids(broken[:_SHOWN]))}; their log-probabilities are finite, but beyond what "
            f"objective.loss_type={objective.loss_type} can compare"
        )


def _tokens(dataset: TripletDataset, roles: Sequence[Role]) -> dict[str, IntArray]:
    """Tokens of prompt and chosen answer by context, the long one last."""
    chosen = [role for role in roles if role.response == "chosen"]
    return {f"tokens_{role.context}": dataset.sizes((role,), 1, share_prompts=False).tokens for role in chosen}


def _write(
    path: Path,
    results: PreferenceResults,
    dataset: TripletDataset,
    tokens: Mapping[str, IntArray],
    columns: Mapping[str, TripletColumn],
    depths: Sequence[Sequence[float]],
) -> None:
    """Write all files; the JSON file last, since it tells that the others are there."""
    table = {name: values.tolist() for name, values in {**tokens, **columns}.items()}
    with atomic_path(path.with_suffix(".jsonl")) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row, name in enumerate(dataset.ids(range(len(dataset)))):
            line = {"id": name, "evidence_depths": depths[row]} | {key: values[row] for key, values in table.items()}
            stream.write(json.dumps(line, allow_nan=False) + "\n")
    with atomic_path(path.with_suffix(".png")) as temporary:
        draw_preference(results, temporary)
    results.write(path)

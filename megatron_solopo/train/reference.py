"""Reference log-probabilities: computed once, one number per sequence, kept on disk.

    <cache>/reference.json  what the numbers depend on: data, weights, precision, roles
    <cache>/train.parquet   id and one float32 column per role; eval.parquet where there is a held-out split

The numbers do not depend on TP, PP, CP or packing, so a cache made under one layout serves all.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.checkpoint.model_files import weights_fingerprint
from megatron_solopo.config import Config, Role
from megatron_solopo.data.loader import TripletDataset
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, check_replaceable, check_writable, write_json
from megatron_solopo.model.build import precision_settings
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.resolve import ResolvedModel
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.policy import load_frozen
from megatron_solopo.train.run_data import Splits, single_pass
from megatron_solopo.train.step import ReferenceLogprobs, logprob_report, run_schedule

_MANIFEST = "reference.json"
_OWN_FILES = (_MANIFEST, "train.parquet", "eval.parquet")
_SCORING_VERSION = 1  # raise it when the same weights and data come to score differently


def reference_logprobs(
    config: Config,
    model: ResolvedModel,
    splits: Splits,
    topology: Topology,
    *,
    overwrite: bool = False,
    apart: bool = False,
    boundary: Callable[[], None] | None = None,
) -> dict[str, ReferenceLogprobs]:
    """By split: read from the cache, or computed and written to it. All ranks together.

    Args:
        overwrite: compute again, over an existing cache.
        apart: see `score_sequences`.
        boundary: called before every batch; where it raises, nothing is written.

    Raises UserError naming what differs if the cache was made for other data, weights or precision.
    """
    cache = config.reference_cache
    expected = reference_dependencies(config, model, splits)
    if overwrite or not _on_rank_0((cache / _MANIFEST).is_file(), topology):
        check_replaceable(cache, _OWN_FILES, "reference.cache")
        check_writable(cache, "reference.cache")
        computed = _compute(config, model, splits, topology, apart, boundary)
        if dist.get_rank() == 0:
            _write(cache, expected, splits, computed)
        dist.barrier()
        return computed
    return cached_reference(config, model, splits)


def cached_reference(config: Config, model: ResolvedModel, splits: Splits) -> dict[str, ReferenceLogprobs]:
    """By split, from the cache alone.

    Raises UserError if there is no cache, or naming what differs if it was made for other data, weights or precision.
    """
    cache, expected = config.reference_cache, reference_dependencies(config, model, splits)
    if not (cache / _MANIFEST).is_file():
        raise UserError(
            f"{cache}: no cached reference log-probs; write them with `megatron-solopo reference`, "
            "or set reference.cache to the directory that holds them"
        )
    _check(cache, expected)
    return {name: _read(cache, name, dataset, expected["roles"]) for name, dataset in splits.datasets.items()}


def fingerprint(references: Mapping[str, ReferenceLogprobs]) -> str:
    """Hex SHA-256 of the numbers themselves: of a cache that is computed again they may differ in the last bits."""
    digest = hashlib.sha256()
    for name, logprobs in sorted(references.items()):
        roles = tuple(str(role) for role in logprobs.roles)
        digest.update(f"{name} {roles}".encode() + logprobs.logps.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _on_rank_0(found: bool, topology: Topology) -> bool:
    """What rank 0 sees: on a shared file system the ranks need not agree, and one that computes alone would wait."""
    seen = torch.tensor(found, dtype=torch.int, device=topology.device)
    dist.broadcast(seen, 0)
    return bool(seen)


def reference_dependencies(config: Config, model: ResolvedModel, splits: Splits) -> dict[str, Any]:
    """Everything the numbers depend on, by a name that a reader of the error understands."""
    return {
        "data": splits.manifest.fingerprint_parts,
        "weights": weights_fingerprint(config.reference.model_path or config.model.path),
        "dtype": config.model.dtype,
        "fp8": precision_settings(config.model),
        "implementation": "transformer_engine" if model.uses_transformer_engine else "local",
        "scoring_version": _SCORING_VERSION,
        "roles": list(config.objective.roles.all),
    }


def _check(cache: Path, expected: dict[str, Any]) -> None:
    try:
        found = json.loads((cache / _MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        raise _damaged(cache, _MANIFEST) from None
    differing = [f"data.{key}" for key in expected["data"] if expected["data"][key] != found["data"].get(key)]
    differing += [key for key in expected if key not in ("data", "roles") and expected[key] != found.get(key)]
    differing += ["roles"] if set(expected["roles"]) - set(found["roles"]) else []
    if differing:
        raise UserError(
            f"{cache}: the cached reference log-probs are stale, made for another {', '.join(differing)}; "
            "run `megatron-solopo reference --overwrite` with this config, or set reference.cache to another directory"
        )


def _compute(
    config: Config,
    model: ResolvedModel,
    splits: Splits,
    topology: Topology,
    apart: bool,
    boundary: Callable[[], None] | None,
) -> dict[str, ReferenceLogprobs]:
    reference = model.at(config.reference.model_path or model.path)
    chunks = load_frozen(reference, topology, chunk_tokens=config.logprob.chunk_tokens)
    return {
        name: score_sequences(config, chunks, dataset, topology, f"reference {name}", apart=apart, boundary=boundary)
        for name, dataset in splits.datasets.items()
    }


def score_sequences(
    config: Config,
    chunks: list[ResponseModel],
    dataset: TripletDataset,
    topology: Topology,
    label: str,
    *,
    apart: bool = False,
    boundary: Callable[[], None] | None = None,
) -> ReferenceLogprobs:
    """Forward every sequence that the objective reads once; every rank ends with all the numbers.

    Args:
        label: of the progress bar.
        apart: one pass for each role, so that a pack must hold the longest sequence and not the largest triplet.
        boundary: called before every batch.
    """
    roles = config.objective.roles.all
    passes = [(role,) for role in roles] if apart else [roles]
    labels = [f"{label}, {role}" for role in roles] if apart else [label]
    logps = [
        _score_pass(config, chunks, dataset, topology, shown, together, boundary)
        for shown, together in zip(labels, passes, strict=True)
    ]
    return ReferenceLogprobs(roles, torch.cat(logps, dim=1))


def _score_pass(
    config: Config,
    chunks: list[ResponseModel],
    dataset: TripletDataset,
    topology: Topology,
    label: str,
    roles: tuple[Role, ...],
    boundary: Callable[[], None] | None,
) -> Tensor:
    """Summed log-probabilities, fp32 [rows, len(roles)]."""
    logps = torch.zeros(len(dataset), len(roles), device=topology.device)
    visits = torch.zeros(len(dataset), device=topology.device)
    for batch in single_pass(config, dataset, topology, label, roles, boundary):
        with torch.no_grad():
            reports = run_schedule(chunks, batch.packs, logprob_report(topology), topology, forward_only=True)
        for pack, counted, report in zip(batch.packs, batch.counted, reports, strict=bool(reports)):
            if counted:
                logps[pack.triplet_indices] = report
                visits[pack.triplet_indices] += 1
    for values in (logps, visits):
        dist.all_reduce(values, group=topology.data_group)
        dist.broadcast(values, topology.last_stage_rank, group=topology.pipeline_group)
    assert bool((visits == 1).all()), "every triplet is scored exactly once"
    return logps.cpu()


def _write(cache: Path, dependencies: dict[str, Any], splits: Splits, computed: dict[str, ReferenceLogprobs]) -> None:
    with atomic_path(cache) as temporary:
        temporary.mkdir()
        for name, logprobs in computed.items():
            columns: dict[str, Any] = {"id": splits.datasets[name].ids(range(len(logprobs.logps)))}
            columns |= {role: logprobs.logps[:, place].numpy() for place, role in enumerate(logprobs.roles)}
            pq.write_table(pa.table(columns), temporary / f"{name}.parquet")
        write_json(temporary / _MANIFEST, dependencies)


def _damaged(cache: Path, file: str) -> ValueError:
    return ValueError(f"{cache / file}: missing or damaged; delete {cache}, and it is computed again")


def _read(cache: Path, name: str, dataset: TripletDataset, roles: list[Role]) -> ReferenceLogprobs:
    try:
        table = pq.read_table(cache / f"{name}.parquet")
    except (OSError, pa.ArrowException):
        raise _damaged(cache, f"{name}.parquet") from None
    if table["id"].to_pylist() != dataset.ids(range(len(dataset))):
        raise UserError(f"{cache / name}.parquet: its ids are not those of data.path; delete {cache}")
    columns: list[Tensor] = [torch.tensor(table[role].to_numpy(), dtype=torch.float32) for role in roles]
    return ReferenceLogprobs(tuple(roles), torch.stack(columns, dim=1))

"""Reference log-probabilities: computed once, one number per sequence, kept on disk.

    <cache>/reference.json  what the numbers depend on: tokens, weights, precision, roles
    <cache>/train.parquet   id and one float32 column per role
    <cache>/eval.parquet    the same, if there is a held-out split

The numbers do not depend on TP, PP, CP or packing, so a cache made under one layout serves all.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.config import Config, Role
from megatron_solopo.data.loader import TripletDataset
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, check_replaceable, check_writable, write_json
from megatron_solopo.model.build import precision_settings
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.resolve import ResolvedModel
from megatron_solopo.parallel.agreement import on_rank_0
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.identity import model_fingerprint
from megatron_solopo.train.policy import load_frozen
from megatron_solopo.train.run_data import RunDatasets, single_pass
from megatron_solopo.train.step import ReferenceLogprobs, logprob_report, run_schedule

_MANIFEST = "reference.json"
_OWN_FILES = (_MANIFEST, "train.parquet", "eval.parquet")
_SHOWN = 3
_SCORING_VERSION = 1  # raise it when a change of the code gives other numbers for the same weights and data


def reference_logprobs(
    config: Config,
    model: ResolvedModel,
    datasets: RunDatasets,
    topology: Topology,
    *,
    overwrite: bool = False,
    separate_roles: bool = False,
    before_batch: Callable[[], None] | None = None,
) -> dict[str, ReferenceLogprobs]:
    """Reference log-probabilities by split: read from the cache, or computed and written to it. All ranks together.

    Args:
        overwrite: compute again, over an existing cache.
        separate_roles: see `score_sequences`.
        before_batch: called before every batch; if it raises, nothing is written.

    Raises UserError naming what differs if the cache was made for other data, weights or precision. Also raises it,
    and writes nothing, if a number is not finite.
    """
    cache = config.reference_cache
    expected = reference_dependencies(config, model, datasets)
    if overwrite or not on_rank_0((cache / _MANIFEST).is_file):
        on_rank_0(lambda: _check_cache_directory(cache))
        computed = _compute(config, model, datasets, topology, separate_roles, before_batch)
        on_rank_0(lambda: _write(cache, expected, datasets, computed))
        return computed
    return cached_reference(config, model, datasets)


def cached_reference(config: Config, model: ResolvedModel, datasets: RunDatasets) -> dict[str, ReferenceLogprobs]:
    """Reference log-probabilities by split, only from the cache. All ranks together.

    Raises UserError if there is no cache. If it was made for other data, weights or precision, the error names them.
    """
    cache, expected = config.reference_cache, reference_dependencies(config, model, datasets)
    on_rank_0(lambda: _check(cache, expected, datasets.manifest.fingerprint_parts))
    return on_rank_0(
        lambda: {name: _read(cache, name, dataset, expected["roles"]) for name, dataset in datasets.by_split.items()}
    )


def _check_cache_directory(cache: Path) -> None:
    check_replaceable(cache, _OWN_FILES, "reference.cache")
    check_writable(cache, "reference.cache")


def reference_dependencies(config: Config, model: ResolvedModel, datasets: RunDatasets) -> dict[str, Any]:
    """Everything that the numbers depend on, by the name that error messages use. All ranks together."""
    return {
        "tokens": datasets.manifest.fingerprint,
        "weights": model_fingerprint(config.reference.model_path or config.model.path),
        "dtype": config.model.dtype,
        "fp8": precision_settings(config.model),
        "implementation": "transformer_engine" if model.uses_transformer_engine else "local",
        "scoring_version": _SCORING_VERSION,
        "roles": list(config.objective.roles.all),
    }


def _check(cache: Path, expected: dict[str, Any], data: dict[str, Any]) -> None:
    """Compare what a cache was made for with what is expected.

    Args:
        data: what the tokens are made from. It only explains why they differ.
    """
    if not (cache / _MANIFEST).is_file():
        raise UserError(
            f"{cache}: no cached reference log-probs; write them with `megatron-solopo reference`, "
            "or set reference.cache to the directory that holds them"
        )
    found = _read_manifest(cache)
    remedy = "run `megatron-solopo reference --overwrite` with this config, or set reference.cache to another directory"
    if "tokens" not in found:
        raise UserError(
            f"{cache}: the cached reference log-probs are of an older version, which did not keep the hash of the "
            f"tokens that they belong to; {remedy}"
        )
    differing = [key for key in expected if key not in ("tokens", "roles") and expected[key] != found[key]]
    differing += ["roles"] if set(expected["roles"]) - set(found["roles"]) else []
    if expected["tokens"] != found["tokens"]:
        parts = [f"data.{key}" for key in data if data[key] != found["data"].get(key)]
        same = "data (from the same file by the same tokenizer and template: does the chat template write the date?)"
        differing = [*(parts or [same]), *differing]
    if differing:
        raise UserError(
            f"{cache}: the cached reference log-probs are stale, made for another {', '.join(differing)}; {remedy}"
        )


def _read_manifest(cache: Path) -> dict[str, Any]:
    """What a cache was made for. Of an older version, it lacks `tokens`."""
    try:
        found = json.loads((cache / _MANIFEST).read_bytes())
        known = {"weights": str, "dtype": str, "fp8": dict, "implementation": str, "scoring_version": int}
        known |= {"data": dict, "roles": list}
        if all(isinstance(found[key], kind) for key, kind in known.items()):
            return dict(found)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    raise _damaged(cache, _MANIFEST)


def _compute(
    config: Config,
    model: ResolvedModel,
    datasets: RunDatasets,
    topology: Topology,
    separate_roles: bool,
    before_batch: Callable[[], None] | None,
) -> dict[str, ReferenceLogprobs]:
    reference = model.at(config.reference.model_path or model.path)
    chunks = load_frozen(reference, topology, chunk_tokens=config.logprob.chunk_tokens)
    computed = {}
    for split, dataset in datasets.by_split.items():
        computed[split] = score_sequences(
            config,
            chunks,
            dataset,
            topology,
            f"reference {split}",
            separate_roles=separate_roles,
            before_batch=before_batch,
        )
        check_finite(computed[split], dataset, f"the reference model {reference.path}", config.model.dtype)
    return computed


def check_finite(logprobs: ReferenceLogprobs, dataset: TripletDataset, model: str, dtype: str) -> None:
    """Raise UserError, on every rank, if a log-probability is NaN or infinite.

    Args:
        model: its kind and its path, for the message.
        dtype: what it was computed in.
    """
    rows, roles = (~logprobs.logps.isfinite()).nonzero(as_tuple=True)
    if not len(rows):
        return
    shown = ", ".join(
        f"{role_name} of {row_id} ({value:g})"
        for role_name, row_id, value in zip(
            (logprobs.roles[role] for role in roles[:_SHOWN].tolist()),
            dataset.ids(rows[:_SHOWN].numpy()),
            logprobs.logps[rows, roles][:_SHOWN].tolist(),
            strict=True,
        )
    )
    raise UserError(
        f"{model} gives log-probabilities that are not finite, for {len(rows)} of {logprobs.logps.numel()} sequences: "
        f"{shown}{', ...' if len(rows) > _SHOWN else ''}; the rows are not the cause: the model has diverged, or its "
        f"numbers exceed {dtype} (model.dtype); take another model"
    )


def score_sequences(
    config: Config,
    chunks: list[ResponseModel],
    dataset: TripletDataset,
    topology: Topology,
    label: str,
    *,
    separate_roles: bool = False,
    before_batch: Callable[[], None] | None = None,
) -> ReferenceLogprobs:
    """Run every sequence that the objective reads through the model once; every rank returns all the numbers.

    Args:
        label: of the progress bar.
        separate_roles: one pass for each role, so that a pack must hold the longest sequence and not the largest
            triplet.
        before_batch: called before every batch.
    """
    roles = config.objective.roles.all
    passes = {f"{label}, {role}": (role,) for role in roles} if separate_roles else {label: roles}
    logps = [
        _score_pass(config, chunks, dataset, topology, pass_label, pass_roles, before_batch)
        for pass_label, pass_roles in passes.items()
    ]
    return ReferenceLogprobs(roles, torch.cat(logps, dim=1))


def _score_pass(
    config: Config,
    chunks: list[ResponseModel],
    dataset: TripletDataset,
    topology: Topology,
    label: str,
    roles: tuple[Role, ...],
    before_batch: Callable[[], None] | None,
) -> Tensor:
    """Summed log-probabilities, fp32 [rows, len(roles)]."""
    logps = torch.zeros(len(dataset), len(roles), device=topology.device)
    visits = torch.zeros(len(dataset), device=topology.device)
    for batch in single_pass(config, dataset, topology, label, roles, before_batch):
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


def _write(
    cache: Path, dependencies: dict[str, Any], datasets: RunDatasets, computed: dict[str, ReferenceLogprobs]
) -> None:
    with atomic_path(cache) as temporary:
        temporary.mkdir()
        for name, logprobs in computed.items():
            columns: dict[str, Any] = {"id": datasets.by_split[name].ids(range(len(logprobs.logps)))}
            columns |= {role: logprobs.logps[:, place].numpy() for place, role in enumerate(logprobs.roles)}
            pq.write_table(pa.table(columns), temporary / f"{name}.parquet")
        write_json(temporary / _MANIFEST, dependencies | {"data": datasets.manifest.fingerprint_parts})


def _damaged(cache: Path, file: str) -> UserError:
    return UserError(f"{cache / file}: missing or damaged; delete {cache}, and it is computed again")


def _read(cache: Path, name: str, dataset: TripletDataset, roles: list[Role]) -> ReferenceLogprobs:
    try:
        table = pq.read_table(cache / f"{name}.parquet")
    except (OSError, pa.ArrowException):
        raise _damaged(cache, f"{name}.parquet") from None
    if table["id"].to_pylist() != dataset.ids(range(len(dataset))):
        raise UserError(f"{cache / name}.parquet: its ids are not those of data.path; delete {cache}")
    if set(roles) - set(table.column_names):
        raise _damaged(cache, f"{name}.parquet")
    columns: list[Tensor] = [torch.tensor(table[role].to_numpy(), dtype=torch.float32) for role in roles]
    logps = torch.stack(columns, dim=1)
    if not logps.isfinite().all():  # older versions wrote what they got
        raise UserError(
            f"{cache / name}.parquet: holds log-probabilities that are not finite; delete {cache}, and they are "
            "computed again"
        )
    return ReferenceLogprobs(tuple(roles), logps)

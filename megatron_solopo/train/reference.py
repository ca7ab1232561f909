"""Reference log-probabilities: computed once, one number per sequence, kept on disk.

    <cache>/reference.json  what the numbers depend on: tokens, weights, precision, roles
    <cache>/train.parquet   id and one float32 column per role
    <cache>/eval.parquet    the same, if there is a held-out split
    <cache>/unfinished/     what an interrupted pass has computed, see `reference_journal`

The numbers do not depend on TP, PP, CP or packing, so a cache made under one layout serves all.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from megatron_solopo.config import Config, Role
from megatron_solopo.data.loader import TripletDataset
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, check_replaceable, check_writable, remove, write_json
from megatron_solopo.model.build import precision_defaults, precision_settings
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.resolve import ResolvedModel
from megatron_solopo.parallel.agreement import on_rank_0
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.identity import differing_parts, model_fingerprint, verbose_weight
from megatron_solopo.train.policy import load_frozen
from megatron_solopo.train.reference_journal import (
    UNFINISHED,
    ReferenceJournal,
    journal_name,
    own_path,
    read_headers,
    read_journals,
)
from megatron_solopo.train.run_data import RunDatasets
from megatron_solopo.train.scoring import check_finite, score_sequences
from megatron_solopo.train.single_pass import PassPoints
from megatron_solopo.train.step import ReferenceLogprobs

_MANIFEST = "reference.json"
_OWN_FILES = (_MANIFEST, "train.parquet", "eval.parquet", UNFINISHED)
_REMEDY = "run `megatron-solopo reference --overwrite` with this config, or set reference.cache to another directory"
_SCORING_VERSION = 1  # raise it when a change of the code gives other numbers for the same weights and data


def reference_logprobs(
    config: Config,
    model: ResolvedModel,
    datasets: RunDatasets,
    topology: Topology,
    *,
    overwrite: bool = False,
    separate_roles: bool = False,
    points: PassPoints | None = None,
    load: Callable[[], list[ResponseModel]] | None = None,
) -> dict[str, ReferenceLogprobs]:
    """Reference log-probabilities by split: read from the cache, or computed and written to it. All ranks together.

    What is computed is kept as it comes. If the pass is interrupted in whatever way, the next call continues it.

    Args:
        overwrite: compute again, over an existing cache. An unfinished pass for the same data, weights and precision is
            continued all the same.
        separate_roles: see `score_sequences`.
        points: see `run_single_pass`.
        load: gives the reference model, which several sources share; None: `load_reference`.

    Raises UserError naming what differs if the cache was made for other data, weights or precision. Also raises it,
    and finishes no cache, if a number is not finite.
    """
    cache = config.reference_cache
    expected = reference_dependencies(config, model, datasets)
    if overwrite or not on_rank_0((cache / _MANIFEST).is_file):
        journals = _open_journals(cache, expected, datasets, topology, overwrite)
        load = load or partial(load_reference, config, model, topology)
        computed = _compute(config, load(), datasets, topology, separate_roles, points, journals)
        on_rank_0(lambda: _write(cache, expected, datasets, computed))
        return {split: for_policy(config, logprobs) for split, logprobs in computed.items()}
    return cached_reference(config, model, datasets)


def load_reference(config: Config, model: ResolvedModel, topology: Topology) -> list[ResponseModel]:
    """This rank's chunks of the reference model."""
    reference = model.at(config.reference.model_path or model.path)
    return load_frozen(reference, topology, chunk_tokens=config.logprob.chunk_tokens, moe=config.moe)


def cached_reference(config: Config, model: ResolvedModel, datasets: RunDatasets) -> dict[str, ReferenceLogprobs]:
    """Reference log-probabilities by split, only from the cache. All ranks together.

    Raises UserError if there is no cache. If it was made for other data, weights or precision, the error names them.
    """
    cache, expected = config.reference_cache, reference_dependencies(config, model, datasets)
    on_rank_0(lambda: _check(cache, expected, datasets.manifest.fingerprint_parts))
    return on_rank_0(
        lambda: {
            name: for_policy(config, _read(cache, name, dataset, config.reference_roles))
            for name, dataset in datasets.by_split.items()
        }
    )


def for_policy(config: Config, logprobs: ReferenceLogprobs) -> ReferenceLogprobs:
    """For each sequence that the objective reads, the reference's log-probability that belongs to it."""
    roles = config.objective.roles.all
    places = [logprobs.roles.index(config.reference_role(role)) for role in roles]
    return ReferenceLogprobs(roles, logprobs.logps[:, places])


def reference_dependencies(config: Config, model: ResolvedModel, datasets: RunDatasets) -> dict[str, Any]:
    """Everything that the numbers depend on, by the name that error messages use. All ranks together."""
    return {
        "tokens": datasets.manifest.fingerprint,
        "weights": model_fingerprint(config.reference.model_path or config.model.path),
        "dtype": config.model.dtype,
        "fp8": precision_settings(config.model.without_gradients),
        "implementation": "transformer_engine" if model.uses_transformer_engine else "local",
        "scoring_version": _SCORING_VERSION,
        "ld_alpha": config.objective.ld_alpha,
        "replay": config.moe.replay if _reads_both_contexts(config.reference_roles) else None,
        "roles": list(config.reference_roles),
    }


def _reads_both_contexts(roles: Sequence[Role]) -> bool:
    """Whether a response is read behind both contexts. Routes are replayed from the one to the other."""
    return any(role.context == "long" and role.on_short_context in roles for role in roles)


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
    if "tokens" not in found:
        raise UserError(
            f"{cache}: the cached reference log-probs are of an older version, which did not keep the hash of the "
            f"tokens that they belong to; {_REMEDY}"
        )
    differing = _differences(expected, found, data)
    if missing := set(expected["roles"]) - set(found["roles"]):
        names = ", ".join(sorted(missing))
        needing = "objective.name, objective.align or reference.context"
        differing.append(f"objective (without {names}, which {needing} needs)")
    if differing:
        raise UserError(
            f"{cache}: the cached reference log-probs are stale, made for another {', '.join(differing)}; {_REMEDY}"
        )


def _differences(expected: dict[str, Any], found: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """What is not as expected, roles aside, with both values where they are readable; `data` as in `_check`."""
    differing = [
        _both_values(name, new, old)
        for key in expected
        if key not in ("tokens", "roles")
        for name, (new, old) in _differing_values(key, expected[key], found.get(key)).items()
    ]
    if expected["tokens"] == found.get("tokens"):
        return differing
    parts = [f"data.{key}" for key in data if data[key] != found.get("data", {}).get(key)]
    same = "data (from the same file by the same tokenizer and template: does the chat template write the date?)"
    return [*(parts or [same]), *differing]


def _differing_values(key: str, expected: Any, found: Any) -> dict[str, tuple[Any, Any]]:
    """The value if it differs, by its name: that of this run, and that of the cache. FP8 has several."""
    if expected and found and isinstance(expected, dict):
        return differing_parts(expected, found, precision_defaults())
    if isinstance(expected, dict):  # without FP8 it is empty
        expected, found = expected.get(key), (found or {}).get(key)
    same = verbose_weight(expected) == verbose_weight(found) if key == "ld_alpha" else expected == found
    return {} if same else {key: (expected, found)}


def _both_values(key: str, expected: Any, found: Any) -> str:
    """A difference with the value of the cache, and the config's key with the value of this run."""
    if key == "weights":  # the values are hashes
        return key
    named = {"scoring_version": key, "replay": "moe.replay", "ld_alpha": "objective.ld_alpha"}
    shown = named.get(key, f"model.{key}")
    before, now = ("null" if value is None else value for value in (found, expected))
    return f"{key} ({before}; this run has {shown}={now})"


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
    chunks: list[ResponseModel],
    datasets: RunDatasets,
    topology: Topology,
    separate_roles: bool,
    points: PassPoints | None,
    journals: Mapping[str, ReferenceJournal],
) -> dict[str, ReferenceLogprobs]:
    path = config.reference.model_path or config.model.path
    computed = {}
    for split, dataset in datasets.by_split.items():
        computed[split] = score_sequences(
            config,
            chunks,
            dataset,
            topology,
            f"reference {split}",
            roles=config.reference_roles,
            separate_roles=separate_roles,
            points=points,
            journal=journals[split],
        )
        check_finite(computed[split], dataset, f"the reference model {path}", config.model.dtype)
    return computed


def _open_journals(
    cache: Path, expected: dict[str, Any], datasets: RunDatasets, topology: Topology, overwrite: bool
) -> dict[str, ReferenceJournal]:
    """A journal for each split, with what earlier starts of the same pass have kept. All ranks together.

    Raises UserError if an unfinished pass was for other data, weights or precision. With `overwrite`, it is removed.
    """
    data, folder = datasets.manifest.fingerprint_parts, cache / UNFINISHED
    header = {key: value for key, value in expected.items() if key != "roles"} | {"data": data}

    def begin() -> dict[str, tuple[str, dict[Role, NDArray[np.float32]]]]:
        check_replaceable(cache, _OWN_FILES, "reference.cache")
        check_writable(cache, "reference.cache")
        for found in read_headers(folder):
            if differing := _differences(expected, found, data):
                if not overwrite:
                    raise UserError(
                        f"{folder}: an unfinished reference pass was made for another {', '.join(differing)}; {_REMEDY}"
                    )
                tqdm.write(f"note: removed {folder}: made for another {', '.join(differing)}", file=sys.stderr)
                remove(folder)
                break
        return {
            split: (journal_name(split), read_journals(folder, split, len(dataset)))
            for split, dataset in datasets.by_split.items()
        }

    return {
        split: ReferenceJournal(own_path(folder, name, topology), header, known, len(datasets.by_split[split]))
        for split, (name, known) in on_rank_0(begin).items()
    }


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


def _read(cache: Path, name: str, dataset: TripletDataset, roles: tuple[Role, ...]) -> ReferenceLogprobs:
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
    return ReferenceLogprobs(roles, logps)

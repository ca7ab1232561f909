"""Compares a Hugging Face directory with a Megatron checkpoint: config, every bit of every tensor, and logits.

transformers computes the logits of the Hugging Face directory in a process of its own, see `strict_load`. Our model
computes those of the checkpoint. Only that comparison imports transformers' and Megatron's models, which takes longer
than to convert a small model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import Tensor

from megatron_solopo.architecture.huggingface_config import Architecture, ModelShape, read_architecture
from megatron_solopo.checkpoint.adapter_checkpoint import is_adapter_checkpoint
from megatron_solopo.checkpoint.huggingface_weights import (
    DTYPES,
    SafetensorsDirectory,
    all_finite,
    bitwise_equal,
)
from megatron_solopo.checkpoint.mapping import Rule, rules
from megatron_solopo.checkpoint.megatron_reader import THREADS
from megatron_solopo.checkpoint.stored_model import StoredModel, stored_model
from megatron_solopo.checkpoint.strict_load import TransformersError, load_strictly
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.errors import UserError
from megatron_solopo.files import counted, first_few

if TYPE_CHECKING:
    from megatron_solopo.model.head import ResponseModel

Verification = Literal["full", "tensors", "none"]
_LOGITS_LIMIT = 1e-5
# Adapters beside weights of 16 bits compute exactly; merged into them they are rounded with them.
_ROUNDED_MERGE_LIMIT = 5e-2
_LENGTHS = (96, 32)
_GIB = 1 << 30


@dataclass
class VerificationReport:
    """The rows of a small table, and one line for each failure."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        return "\n".join(f"{name:<{width}}  {found}" for name, found in self.rows)

    def add(self, name: str, found: str, failure: str = "") -> None:
        """Add a row. If something is wrong, `failure` says what."""
        self.rows.append((name, f"{found}{' FAILED' if failure else ''}"))
        if failure:
            self.failures.append(failure)


def verify(huggingface: Path, checkpoint: Path, *, logits: bool, progress: Callable[[int], Any]) -> VerificationReport:
    """Compare the two directories. If precisions differ, the checkpoint's numbers are rounded first, as in an export.

    Differences are failures of the report. Raises UserError if one of the directories is damaged.
    """
    theirs, architecture = read_architecture(huggingface), read_architecture(checkpoint)
    source = SafetensorsDirectory(huggingface)
    source.check(theirs)
    stored = stored_model(checkpoint, architecture)
    report = VerificationReport()
    differing = ", ".join(_differing_fields(theirs, architecture))
    message = f"{huggingface} and {checkpoint}: config.json differs in {differing}" if differing else ""
    report.add("config", differing or "same model, same rotary frequencies", message)
    if differing:
        return report
    rounded = _compare_tensors(report, source, stored, architecture, progress)
    if not logits:
        report.add("logits", "skipped: not asked for")
    elif report.failures:
        report.add("logits", "skipped: the tensors differ or are damaged")
    else:
        _compare_logits(report, huggingface, checkpoint, architecture, rounded)
    return report


def to_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a tensor to a precision; raises UserError, naming it, if a finite number would become infinite."""
    if tensor.dtype is dtype:
        return tensor
    rounded = tensor.to(dtype)
    # Only fp16 has a smaller range than the other precisions.
    if dtype is torch.float16 and bool((rounded.isinf() & tensor.isfinite()).any()):
        raise UserError(f"{name}: has numbers beyond the range of float16; choose --dtype bfloat16 or float32")
    return rounded


def _differing_fields(huggingface: Architecture, checkpoint: Architecture) -> Iterator[str]:
    """Yield the names of fields that differ. Values are shown, except those of tensors."""
    names = [each.name for each in fields(ModelShape)]
    for name in (*names, "layernorm_epsilon", "inv_freq", "rotary_scale"):
        theirs, ours = getattr(huggingface, name), getattr(checkpoint, name)
        if not isinstance(ours, Tensor):
            if theirs != ours:
                yield f"{name} ({theirs} in Hugging Face, {ours} in the checkpoint)"
        elif not torch.equal(theirs, ours):
            yield name


def _compare_tensors(
    report: VerificationReport,
    source: SafetensorsDirectory,
    stored: StoredModel,
    architecture: Architecture,
    progress: Callable[[int], Any],
) -> str:
    """Add what it finds; returns the precisions that the checkpoint was rounded to, or an empty string."""
    casts = Counter[tuple[torch.dtype, torch.dtype]]()
    for rule in rules(architecture).values():
        dtype = stored.dtype(rule)
        casts.update((dtype, DTYPES[source.entries[name].dtype]) for name in rule.huggingface)
    with ThreadPoolExecutor(THREADS) as pool:
        compared = list(pool.map(lambda rule: _compare(rule, source, stored, progress), rules(architecture).values()))
    differing = [name for each in compared for name in each.differing]
    damaged = [name for each in compared for name in each.damaged]
    total = casts.total()
    verb = "differs" if len(differing) == 1 else "differ"
    what = f"{counted(len(differing), 'tensor')} {verb}: {first_few(differing)}"
    rounded = ", ".join(sorted({_name(new) for old, new in casts if _rounds(old, new)}))
    found = f"{total - len(differing)} of {total} bitwise equal" + (f" after rounding to {rounded}" if rounded else "")
    report.add("tensors", found, f"{source.path} and {stored.path}: {what}" if differing else "")
    if damaged:
        found = f"not finite (NaN or infinity): {first_few(damaged)}"
        report.add("numbers", found, found)
    report.add("precision", "; ".join(sorted(f"{count} {_described(*cast)}" for cast, count in casts.items())))
    return rounded


@dataclass
class _Compared:
    """Names of tensors with a problem, each once, in the order of discovery."""

    differing: dict[str, None] = field(default_factory=dict)
    damaged: dict[str, None] = field(default_factory=dict)
    """Names and places of tensors with NaN or infinity."""


def _compare(
    rule: Rule,
    source: SafetensorsDirectory,
    stored: StoredModel,
    progress: Callable[[int], Any],
) -> _Compared:
    found = _Compared()
    for name, row, block in stored.blocks(rule):
        other = source.read(name, (slice(row, row + len(block)),))
        same = bitwise_equal(to_dtype(name, block, other.dtype), other)
        if not same:
            found.differing[name] = None
        if not all_finite(other):
            found.damaged[f"{name} in {source.path / source.entries[name].file}"] = None
        # Identical numbers are checked only once.
        if not (same and block.dtype is other.dtype) and not all_finite(block):
            found.damaged[f"{name} in {stored.path}"] = None
        progress(other.nbytes)
    return found


def _described(stored: torch.dtype, other: torch.dtype) -> str:
    """Describe the precisions of a tensor in the checkpoint and in the Hugging Face directory."""
    if stored is other:
        return f"{_name(stored)} in both"
    change = "rounded" if _rounds(stored, other) else "exact"
    return f"{_name(stored)} in the checkpoint, {_name(other)} in Hugging Face ({change})"


def _rounds(stored: torch.dtype, other: torch.dtype) -> bool:
    return other not in (stored, torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compare_logits(
    report: VerificationReport, huggingface: Path, checkpoint: Path, architecture: Architecture, rounded: str
) -> None:
    missing = _memory_missing(architecture)
    sequences = None if missing else _sequences(architecture)
    try:
        loaded, theirs_TV = load_strictly(huggingface, sequences)
    except TransformersError as failure:
        report.add("loaded", "by transformers, in a process of its own", str(failure))
        return
    report.add("loaded", loaded)
    if sequences is None or theirs_TV is None:
        report.add("logits", f"skipped: {missing}")
        return
    error = _logits_error(theirs_TV, checkpoint, architecture, SafetensorsDirectory(huggingface), sequences)
    positions = len(theirs_TV)
    limit = _ROUNDED_MERGE_LIMIT if rounded and is_adapter_checkpoint(checkpoint) else _LOGITS_LIMIT
    found = f"{positions} positions, fp32: greatest relative error {error:.1e} (limit {limit:.0e})"
    message = f"{huggingface} and {checkpoint}: logits differ by {error:.1e}, more than {limit:.0e}"
    found += f" (checkpoint rounded to {rounded})" if rounded else ""
    report.add("logits", found, "" if error < limit else message)


def _memory_missing(architecture: Architecture) -> str:
    """Say why this machine cannot compare the logits, or return an empty string. One model must fit in fp32."""
    needed = int(1.25 * 4 * architecture.num_parameters) + _GIB
    available = psutil.virtual_memory().available
    if needed <= available:
        return ""
    return f"the model in fp32 needs {needed / _GIB:.1f} GiB of memory, {available / _GIB:.1f} GiB are available"


def _sequences(architecture: Architecture) -> list[Tensor]:
    """Random token ids, int64 [T] each."""
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, architecture.max_sequence_length) for length in _LENGTHS]
    return [torch.randint(architecture.vocab_size, (length,), generator=generator) for length in lengths]


def _logits_error(
    theirs_TV: Tensor,
    checkpoint: Path,
    architecture: Architecture,
    precision: SafetensorsDirectory,
    sequences: list[Tensor],
) -> float:
    """Return the greatest relative error |ours - theirs| / |theirs| of a position's logits.

    Our model computes in fp32. If the precisions of the weights differ, those of the checkpoint are rounded first.
    """
    ours_TV = _our_logits(checkpoint, architecture, precision, sequences)
    error = (ours_TV - theirs_TV).norm(dim=1) / theirs_TV.norm(dim=1)
    return float(error.nan_to_num(nan=torch.inf).max())


@torch.no_grad()
def _our_logits(
    path: Path, architecture: Architecture, precision: SafetensorsDirectory, sequences: list[Tensor]
) -> Tensor:
    """Logits by our model, fp32 [T, V]. The sequences are packed into one."""

    from megatron_solopo.checkpoint.load import load_weights
    from megatron_solopo.model.build import build_model
    from megatron_solopo.model.resolve import resolve_model
    from megatron_solopo.parallel import topology

    groups = topology.initialize(ParallelConfig(), seed=1)
    try:
        config = ModelConfig(path=path, dtype="float32", implementation="local")
        resolved = resolve_model(config, ParallelConfig(), architecture=architecture)
        (model,) = build_model(resolved, chunk_tokens=1, device=groups.device)
        load_weights([model], architecture, path)
        _round(model, architecture, precision)
        logits_TV = torch.cat([model(tokens.unsqueeze(0), None, None)[0] for tokens in sequences])
        return logits_TV[:, : architecture.vocab_size].clone()
    finally:
        topology.destroy(groups)


def _round(model: ResponseModel, architecture: Architecture, precision: SafetensorsDirectory) -> None:
    """Round every parameter to the precision of its Hugging Face tensors."""
    from megatron_solopo.checkpoint.load import global_parameters

    table = rules(architecture)
    for name, parameter in global_parameters(model):
        if name in table:  # not of an adapter
            entry = precision.entries[table[name].huggingface[0]]
            parameter.copy_(parameter.to(DTYPES[entry.dtype]))

"""Compares a Hugging Face directory with a Megatron checkpoint: config, every bit of every tensor, logits."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_solopo.checkpoint.huggingface import DTYPES, SafetensorsDirectory, bitwise_equal
from megatron_solopo.checkpoint.logits import LOGITS_LIMIT, logits_error, memory_missing
from megatron_solopo.checkpoint.mapping import huggingface_tensors, rules
from megatron_solopo.checkpoint.megatron import MegatronDirectory
from megatron_solopo.model.architecture import Architecture, read_architecture

Verification = Literal["full", "tensors", "none"]
_SHOWN = 5
_BLOCK = 1 << 22


@dataclass
class Report:
    """A small table, and what was found wrong: one line each."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        return "\n".join(f"{name:<{width}}  {found}" for name, found in self.rows)

    def add(self, name: str, found: str, failure: str = "") -> None:
        """Add a row; `failure` says what is wrong, where something is."""
        self.rows.append((name, f"{found}{' FAILED' if failure else ''}"))
        if failure:
            self.failures.append(failure)


def verify(huggingface: Path, checkpoint: Path, *, logits: bool, progress: Callable[[int], Any]) -> Report:
    """Compare the two directories. Where precisions differ, the checkpoint's numbers are rounded as an export would.

    Raises ValueError if one of them is not what it should be; what merely differs is in the report's failures.
    """
    architecture = read_architecture(checkpoint)
    source, stored = SafetensorsDirectory(huggingface), MegatronDirectory(checkpoint)
    source.check(read_architecture(huggingface))
    stored.check(architecture)
    report = Report()
    differing = _differing_fields(architecture, read_architecture(huggingface))
    message = f"{huggingface} and {checkpoint}: config.json differs in {', '.join(differing)}" if differing else ""
    report.add("config", "same model, same rotary frequencies" if not differing else ", ".join(differing), message)
    if differing:
        return report
    _compare_tensors(report, source, stored, architecture, progress)
    if not logits:
        report.add("logits", "skipped: not asked for")
    elif report.failures:
        report.add("logits", "skipped: the tensors differ")
    elif missing := memory_missing(architecture):
        report.add("logits", f"skipped: {missing}")
    else:
        _compare_logits(report, huggingface, checkpoint)
    return report


def to_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another precision; raises ValueError, naming it, where a finite number would become infinite."""
    if tensor.dtype is dtype:
        return tensor
    rounded = tensor.to(dtype)
    # fp16 alone has a smaller range than another of the precisions. Block by block: this takes memory of its own.
    blocks = zip(rounded.flatten().split(_BLOCK), tensor.flatten().split(_BLOCK), strict=True)
    if dtype is torch.float16 and any(bool((new.isinf() & old.isfinite()).any()) for new, old in blocks):
        raise ValueError(f"{name}: has numbers beyond the range of float16; choose --dtype bfloat16 or float32")
    return rounded


def _differing_fields(one: Architecture, other: Architecture) -> list[str]:
    def same(name: str) -> bool:
        mine, theirs = getattr(one, name), getattr(other, name)
        return torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs

    return [each.name for each in fields(Architecture) if not same(each.name)]


def _compare_tensors(
    report: Report,
    source: SafetensorsDirectory,
    stored: MegatronDirectory,
    architecture: Architecture,
    progress: Callable[[int], Any],
) -> None:
    total, casts, differing = 0, Counter[str](), []
    for rule in rules(architecture).values():
        for name, tensor in huggingface_tensors(rule, architecture, stored.rows_of(rule)):
            dtype = DTYPES[source.entries[name].dtype]
            casts[_described(tensor.dtype, dtype)] += 1
            other = source.read(name)
            if not bitwise_equal(to_dtype(name, tensor, dtype), other):
                differing.append(name)
            total += 1
            progress(other.nbytes)
    shown = ", ".join(differing[:_SHOWN]) + (", ..." if len(differing) > _SHOWN else "")
    message = f"{source.path} and {stored.path}: {len(differing)} tensors differ: {shown}" if differing else ""
    report.add("tensors", f"{total - len(differing)} of {total} bitwise equal", message)
    report.add("precision", "; ".join(f"{count} {what}" for what, count in sorted(casts.items())))


def _described(stored: torch.dtype, other: torch.dtype) -> str:
    """A precision, or a change of one, from the checkpoint to Hugging Face."""
    one, two = (str(dtype).removeprefix("torch.") for dtype in (stored, other))
    if stored is other:
        return f"{one} in both"
    exact = other is torch.float32
    return f"{one} in the checkpoint, {two} in Hugging Face ({'exact' if exact else 'rounded'})"


def _compare_logits(report: Report, huggingface: Path, checkpoint: Path) -> None:
    error, positions = logits_error(huggingface, checkpoint)
    found = f"{positions} positions, fp32: greatest relative error {error:.1e} (limit {LOGITS_LIMIT:.0e})"
    message = f"{huggingface} and {checkpoint}: logits differ by {error:.1e}, more than {LOGITS_LIMIT:.0e}"
    report.add("logits", found, "" if error < LOGITS_LIMIT else message)

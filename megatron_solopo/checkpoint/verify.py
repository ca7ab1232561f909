"""Logits of a Hugging Face directory, by transformers, and of a Megatron checkpoint, by our model.

Compares a Hugging Face directory with a Megatron checkpoint: config, every bit of every tensor, logits.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from megatron_solopo.architecture.huggingface_config import Architecture, ModelShape, read_architecture
from megatron_solopo.checkpoint.huggingface_weights import (
    DTYPES,
    SafetensorsDirectory,
    all_finite,
    bitwise_equal,
    shown_names,
)
from megatron_solopo.checkpoint.load import global_parameters, load_weights
from megatron_solopo.checkpoint.mapping import Rule, huggingface_blocks, rules
from megatron_solopo.checkpoint.megatron_reader import THREADS, MegatronDirectory
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.errors import UserError
from megatron_solopo.files import counted
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel import topology

LOGITS_LIMIT = 1e-5
_LENGTHS = (96, 32)
_GIB = 1 << 30


class TransformersError(Exception):
    """transformers cannot load or run a model, for whatever reason; one line."""


def memory_missing(architecture: Architecture) -> str:
    """Why the logits cannot be compared on this machine, or an empty string: the model must fit in fp32, once."""
    needed = int(1.25 * 4 * architecture.num_parameters) + _GIB
    available = psutil.virtual_memory().available
    if needed <= available:
        return ""
    return f"the model in fp32 needs {needed / _GIB:.1f} GiB of memory, {available / _GIB:.1f} GiB are available"


def logits_error(huggingface: Path, checkpoint: Path) -> tuple[float, int]:
    """Greatest relative error |ours - theirs| / |theirs| of a position's logits, in fp32, and the number of positions.

    One model is in memory at a time. Where the Hugging Face weights are of another precision than the
    checkpoint's, the latter are rounded likewise first. Raises TransformersError.
    """
    architecture = read_architecture(checkpoint)
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, architecture.max_sequence_length) for length in _LENGTHS]
    sequences = [torch.randint(architecture.vocab_size, (length,), generator=generator) for length in lengths]
    theirs_TV = _huggingface_logits(huggingface, sequences)
    ours_TV = _our_logits(checkpoint, architecture, SafetensorsDirectory(huggingface), sequences)
    error = (ours_TV - theirs_TV).norm(dim=1) / theirs_TV.norm(dim=1)
    return float(error.nan_to_num(nan=torch.inf).max()), len(error)


@torch.no_grad()
def _huggingface_logits(path: Path, sequences: list[Tensor]) -> Tensor:
    """fp32 [T, V]."""
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        return torch.cat([model(input_ids=tokens.unsqueeze(0)).logits[0] for tokens in sequences])
    # What it raises shares no base class: a package that is missing, a field that its checks let pass, ...
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise TransformersError(f"{path}: transformers cannot run it: {type(error).__name__}: {reason}") from None
    finally:
        if shows_progress:
            logging.enable_progress_bar()


@torch.no_grad()
def _our_logits(
    path: Path, architecture: Architecture, precision: SafetensorsDirectory, sequences: list[Tensor]
) -> Tensor:
    """fp32 [T, V], of the sequences packed into one."""
    groups = topology.initialize(ParallelConfig(), seed=1)
    try:
        config = ModelConfig(path=path, dtype="float32", implementation="local")
        resolved = resolve_model(config, ParallelConfig(), architecture=architecture)
        (model,) = build_model(resolved, chunk_tokens=1, device=groups.device)
        load_weights([model], architecture, path)
        _round(model, architecture, precision)
        lengths = torch.tensor([0, *(len(tokens) for tokens in sequences)])
        boundaries_S1 = lengths.cumsum(0).to(torch.int32)
        longest = int(lengths.max())
        packing = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries_S1,
            cu_seqlens_kv=boundaries_S1,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        logits_1TV = model(torch.cat(sequences).unsqueeze(0), None, None, packed_seq_params=packing)
        return logits_1TV[0, :, : architecture.vocab_size].clone()
    finally:
        topology.destroy(groups)


def _round(model: ResponseModel, architecture: Architecture, precision: SafetensorsDirectory) -> None:
    """Give every parameter the precision of its Hugging Face tensors."""
    table = rules(architecture)
    for name, parameter in global_parameters(model):
        entry = precision.entries[table[name].huggingface[0]]
        parameter.copy_(parameter.to(DTYPES[entry.dtype]))


Verification = Literal["full", "tensors", "none"]


@dataclass
class VerificationReport:
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


def verify(huggingface: Path, checkpoint: Path, *, logits: bool, progress: Callable[[int], Any]) -> VerificationReport:
    """Compare the two directories. Where precisions differ, the checkpoint's numbers are rounded as an export would.

    Raises UserError if one of them is not what it should be; what merely differs is in the report's failures.
    """
    architecture = read_architecture(checkpoint)
    source, stored = SafetensorsDirectory(huggingface), MegatronDirectory(checkpoint)
    source.check(read_architecture(huggingface))
    stored.check(architecture)
    report = VerificationReport()
    differing = ", ".join(_differing_fields(read_architecture(huggingface), architecture))
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
    """A tensor in another precision; raises UserError, naming it, where a finite number would become infinite."""
    if tensor.dtype is dtype:
        return tensor
    rounded = tensor.to(dtype)
    # fp16 alone has a smaller range than another of the precisions.
    if dtype is torch.float16 and bool((rounded.isinf() & tensor.isfinite()).any()):
        raise UserError(f"{name}: has numbers beyond the range of float16; choose --dtype bfloat16 or float32")
    return rounded


def _differing_fields(huggingface: Architecture, checkpoint: Architecture) -> Iterator[str]:
    """Names, with both values but for those of tensors."""
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
    stored: MegatronDirectory,
    architecture: Architecture,
    progress: Callable[[int], Any],
) -> str:
    """Adds what it finds; returns the precisions that the checkpoint had to be rounded to, an empty string for none."""
    casts = Counter[tuple[torch.dtype, torch.dtype]]()
    for rule in rules(architecture).values():
        casts.update((stored.dtype(rule), DTYPES[source.entries[name].dtype]) for name in rule.huggingface)
    with ThreadPoolExecutor(THREADS) as pool:
        compared = list(
            pool.map(lambda rule: _compare(rule, source, stored, architecture, progress), rules(architecture).values())
        )
    differing = [name for each in compared for name in each.differing]
    damaged = [name for each in compared for name in each.damaged]
    total = casts.total()
    verb = "differs" if len(differing) == 1 else "differ"
    what = f"{counted(len(differing), 'tensor')} {verb}: {shown_names(differing)}"
    rounded = ", ".join(sorted({_name(new) for old, new in casts if _rounds(old, new)}))
    found = f"{total - len(differing)} of {total} bitwise equal" + (f" after rounding to {rounded}" if rounded else "")
    report.add("tensors", found, f"{source.path} and {stored.path}: {what}" if differing else "")
    if damaged:
        found = f"not finite (NaN or infinity): {shown_names(damaged)}"
        report.add("numbers", found, found)
    report.add("precision", "; ".join(sorted(f"{count} {_described(*cast)}" for cast, count in casts.items())))
    return rounded


@dataclass
class _Compared:
    """What is wrong with tensors, each once, in the order in which it was found."""

    differing: dict[str, None] = field(default_factory=dict)
    damaged: dict[str, None] = field(default_factory=dict)
    """Names, and where."""


def _compare(
    rule: Rule,
    source: SafetensorsDirectory,
    stored: MegatronDirectory,
    architecture: Architecture,
    progress: Callable[[int], Any],
) -> _Compared:
    found, read, itemsize = _Compared(), stored.rows_of(rule), stored.dtype(rule).itemsize
    for name, row, block in huggingface_blocks(rule, architecture, read, itemsize):
        other = source.read(name, (slice(row, row + len(block)),))
        same = bitwise_equal(to_dtype(name, block, other.dtype), other)
        if not same:
            found.differing[name] = None
        if not all_finite(other):
            found.damaged[f"{name} in {source.path / source.entries[name].file}"] = None
        # The very same numbers need not be looked at twice.
        if not (same and block.dtype is other.dtype) and not all_finite(block):
            found.damaged[f"{name} in {stored.path}"] = None
        progress(other.nbytes)
    return found


def _described(stored: torch.dtype, other: torch.dtype) -> str:
    """A precision, or a change of one, from the checkpoint to Hugging Face."""
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
    if missing := memory_missing(architecture):
        report.add("logits", f"skipped: {missing}")
        return
    try:
        error, positions = logits_error(huggingface, checkpoint)
    except TransformersError as failure:
        report.add("logits", "not compared", str(failure))
        return
    found = f"{positions} positions, fp32: greatest relative error {error:.1e} (limit {LOGITS_LIMIT:.0e})"
    message = f"{huggingface} and {checkpoint}: logits differ by {error:.1e}, more than {LOGITS_LIMIT:.0e}"
    found += f" (checkpoint rounded to {rounded})" if rounded else ""
    report.add("logits", found, "" if error < LOGITS_LIMIT else message)

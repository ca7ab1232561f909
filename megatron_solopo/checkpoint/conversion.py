"""Converts between Hugging Face directories and Megatron checkpoints. An output is complete and verified, or absent."""

import errno
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from megatron_solopo.architecture.adapters import adapter_config
from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.architecture.model_directory import (
    ADAPTER_CONFIG,
    CONFIG,
    HUGGINGFACE_FOLDER,
    check_huggingface_directory,
    check_megatron_checkpoint,
    has_tokenizer,
    huggingface_directory,
    is_megatron_checkpoint,
)
from megatron_solopo.checkpoint.adapter_checkpoint import AdapterCheckpoint, is_adapter_checkpoint
from megatron_solopo.checkpoint.export_files import absent_counterparts, export_files
from megatron_solopo.checkpoint.huggingface_weights import DTYPES, SafetensorsDirectory, SafetensorsWriter, all_finite
from megatron_solopo.checkpoint.manifest import check_listed, sealed_files, write_manifest
from megatron_solopo.checkpoint.mapping import Rule, all_huggingface_shapes, rules
from megatron_solopo.checkpoint.megatron_reader import THREADS
from megatron_solopo.checkpoint.megatron_writer import write_megatron
from megatron_solopo.checkpoint.model_files import MODEL_FILES_MANIFEST, read_model_files, source_dtypes, write_files
from megatron_solopo.checkpoint.peft_directory import ADAPTER_WEIGHTS
from megatron_solopo.checkpoint.stored_model import stored_model
from megatron_solopo.checkpoint.verify import Verification, VerificationReport, to_dtype, verify
from megatron_solopo.data.tokenizer_contradictions import check_tokenizer_files
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, check_writable, counted, described_bytes
from megatron_solopo.progress import bar_style

Dtype = Literal["bfloat16", "float16", "float32"]
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SMALL_MODEL_BYTES, _LARGEST_FILE_BYTES = 10**9, 5 * 10**9


def import_model(source: Path, output: Path, *, verification: Verification) -> VerificationReport:
    """Write the Hugging Face model in `source` as a Megatron checkpoint. Each tensor keeps its precision.

    Raises UserError if the model is not supported or damaged, `output` exists, space is too small, or the checkpoint
    does not verify. Then no `output` is left behind.
    """
    check_huggingface_directory(source, "--hf")
    _check_output(output, source)
    architecture = read_architecture(source)
    weights = SafetensorsDirectory(source)
    weights.check(architecture)
    check_tokenizer_files(source)
    dtypes = {name: DTYPES[weights.entries[name].dtype] for name in all_huggingface_shapes(architecture)}
    files = read_model_files(source)
    total = _total_bytes(architecture, dtypes)
    with _output(output, total, files) as temporary:
        with _bar("import", total) as progress:
            write_megatron(weights, architecture, temporary, progress)
        write_files(files, temporary / HUGGINGFACE_FOLDER)
        report = _verified(source, temporary, output, verification, total)
        names = [str(file.relative_to(temporary)) for file in temporary.rglob("*") if file.is_file()]
        write_manifest(temporary, sealed_files(temporary, names))
        if not has_tokenizer(source):
            report.add("files", f"no tokenizer files in {source}: the export will have none")
        return report


def export_model(
    checkpoint: Path, output: Path, *, dtype: Dtype | None, verification: Verification, merge: bool = False
) -> VerificationReport:
    """Write the model of a Megatron checkpoint as a Hugging Face directory.

    Args:
        merge: whether a checkpoint of adapters is meant, whose base gets them.
        dtype: the precision to write. With None, each tensor gets the precision of its original Hugging Face tensor.

    Raises UserError if the checkpoint is damaged, `output` exists, or space is too small. Numbers that are not finite
    or beyond the range of `dtype`, and files that do not verify, are refused as well. Then no `output` is left behind.
    """
    check_megatron_checkpoint(checkpoint, "--checkpoint")
    has_adapters = is_adapter_checkpoint(checkpoint)
    if merge and not has_adapters:
        raise UserError(f"--checkpoint={checkpoint}: holds a whole model and no adapters; leave out --merge")
    if has_adapters and not merge:
        raise UserError(
            f"--checkpoint={checkpoint}: holds adapters; --adapter writes them for PEFT, --merge writes the whole model"
        )
    _check_output(output, checkpoint)
    architecture = read_architecture(checkpoint)
    stored = stored_model(checkpoint, architecture)
    files = read_model_files(checkpoint)
    dtypes = _target_dtypes(checkpoint, architecture, dtype)
    checksums = check_listed(checkpoint, checksums=True)
    total = _total_bytes(architecture, dtypes)
    files.pop(MODEL_FILES_MANIFEST, None)
    files, notes = export_files(huggingface_directory(checkpoint), files, architecture, dtypes)
    with _output(output, total, files) as temporary:
        writer = SafetensorsWriter(temporary, _meta_tensors(architecture, dtypes), _file_bytes(total))
        with _bar("export", total) as progress, ThreadPoolExecutor(THREADS) as pool:

            def export(rule: Rule) -> None:
                for name, row, block in stored.blocks(rule):
                    if not all_finite(block):
                        raise UserError(
                            f"{checkpoint}: {name} is not finite (NaN or infinity); the checkpoint is damaged or its "
                            "training diverged: take an earlier one"
                        )
                    writer.write(name, to_dtype(name, block, dtypes[name]), row)
                    progress(block.numel() * dtypes[name].itemsize)

            list(pool.map(export, _far_apart(list(rules(architecture).values()))))
        writer.finish()
        write_files(files, temporary)
        report = _verified(temporary, checkpoint, output, verification, total)
        report.add("checksums", checksums)
        for note in notes:
            report.add("files", note)
        return report


def export_adapter(checkpoint: Path, output: Path, *, dtype: Dtype | None) -> VerificationReport:
    """Write the adapters of a checkpoint as a PEFT directory, with the tokenizer.

    Args:
        dtype: the precision to write. None: the stored one.

    Raises UserError if the checkpoint holds no adapters or is damaged, or `output` exists. Then no `output` is left.
    """
    check_megatron_checkpoint(checkpoint, "--checkpoint")
    if not is_adapter_checkpoint(checkpoint):
        raise UserError(f"--checkpoint={checkpoint}: holds a whole model and no adapters; leave out --adapter")
    _check_output(output, checkpoint)
    adapters = AdapterCheckpoint(checkpoint, read_architecture(checkpoint))
    checksums = check_listed(checkpoint, checksums=True)
    tensors = {name: adapters.read(name) for name in adapters.tensors}
    if dtype is not None:
        tensors = {name: to_dtype(name, each, getattr(torch, dtype)) for name, each in tensors.items()}
    files = read_model_files(checkpoint)
    for name in (MODEL_FILES_MANIFEST, CONFIG):  # they describe the base's weights
        files.pop(name, None)
    files[ADAPTER_CONFIG] = adapter_config(adapters.lora, adapters.base)
    with _output(output, sum(each.nbytes for each in tensors.values()), files) as temporary:
        contiguous = {name: each.contiguous() for name, each in tensors.items()}
        save_file(contiguous, temporary / ADAPTER_WEIGHTS, {"format": "pt"})
        write_files(files, temporary)
    report = VerificationReport()
    report.add("adapters", f"{counted(len(tensors), 'tensor')} beside {adapters.base}")
    report.add("checksums", checksums)
    return report


def verify_models(huggingface: Path, checkpoint: Path, *, logits: bool) -> VerificationReport:
    """Compare two existing directories; raises UserError if one of them is of another kind or damaged."""
    if is_megatron_checkpoint(huggingface) and not is_megatron_checkpoint(checkpoint):
        raise UserError(
            f"--hf={huggingface}: is a Megatron checkpoint, but --checkpoint={checkpoint} is not one; exchange the two"
        )
    check_huggingface_directory(huggingface, "--hf")
    check_megatron_checkpoint(checkpoint, "--checkpoint")
    checksums = check_listed(checkpoint, checksums=True)
    total = sum(
        torch.Size(entry.shape).numel() * DTYPES[entry.dtype].itemsize
        for entry in SafetensorsDirectory(huggingface).entries.values()
        if entry.dtype in DTYPES
    )
    with _bar("verify", total) as progress:
        report = verify(huggingface, checkpoint, logits=logits, progress=progress)
    report.add("checksums", checksums)
    for absent in absent_counterparts(huggingface):
        report.add("files", absent, absent)
    return report


def _verified(
    huggingface: Path, checkpoint: Path, output: Path, verification: Verification, total: int
) -> VerificationReport:
    """Verify before the output gets its name; raises UserError if something differs."""
    if verification == "none":
        report = VerificationReport()
        report.add("verification", "skipped: not asked for")
        return report
    with _bar("verify", total) as progress:
        report = verify(huggingface, checkpoint, logits=verification == "full", progress=progress)
    if report.failures:
        raise UserError(f"{output}: was not written, because it did not verify: {'; '.join(report.failures)}")
    return report


def _target_dtypes(checkpoint: Path, architecture: Architecture, dtype: Dtype | None) -> dict[str, torch.dtype]:
    names = all_huggingface_shapes(architecture)
    if dtype is not None:
        return dict.fromkeys(names, getattr(torch, dtype))
    originals = source_dtypes(checkpoint)
    if absent := [name for name in names if name not in originals]:
        raise UserError(f"{checkpoint}: does not state the original precision of {absent[0]}; choose one with --dtype")
    return {name: DTYPES[originals[name]] for name in names}


def _file_bytes(total: int) -> int:
    """The most bytes in one file. A large model has at least one file per thread, see `_far_apart`."""
    return min(_LARGEST_FILE_BYTES, max(_SMALL_MODEL_BYTES, total // THREADS + 1))


def _far_apart(table: list[Rule]) -> list[Rule]:
    """Order the rules so that neighbours lie in different files, if there are several.

    Threads write neighbours at the same time, and a file system lets only one thread write to a file.
    """
    stride = -(-len(table) // THREADS)
    return [rule for start in range(stride) for rule in table[start::stride]]


def _meta_tensors(architecture: Architecture, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    shapes = all_huggingface_shapes(architecture)
    return {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}


def _total_bytes(architecture: Architecture, dtypes: dict[str, torch.dtype]) -> int:
    return sum(tensor.nbytes for tensor in _meta_tensors(architecture, dtypes).values())


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], Any]]:
    with tqdm(desc=label, total=total, unit="B", unit_scale=True, **bar_style("bytes")) as bar:
        yield bar.update


def _check_output(output: Path, source: Path) -> None:
    """Raise UserError, before the work, if `output` cannot or must not be written."""
    if output.exists():
        raise UserError(f"{output}: exists already; choose another --out, or remove it first")
    if output.is_symlink():
        raise UserError(
            f"{output}: is a link to {output.readlink()}, which does not exist; choose another --out, or remove "
            "the link first"
        )
    if output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{output}: lies inside {source}, which is the source; choose another --out")
    check_writable(output, "--out")


@contextmanager
def _output(output: Path, total: int, files: dict[str, bytes]) -> Iterator[Path]:
    """Yield a temporary directory, which becomes `output` if the body succeeds."""
    needed = total + sum(map(len, files.values()))
    _check_space(output, needed)
    with atomic_path(output) as temporary:
        temporary.mkdir()
        with _named_when_full(output, needed):
            yield temporary


def _check_space(output: Path, needed: int) -> None:
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{output}: needs {described_bytes(needed)}, but {described_bytes(free)} are free on its file system; "
            "choose another --out, or free some space"
        )


@contextmanager
def _named_when_full(output: Path, needed: int) -> Iterator[None]:
    """Turn the error of a full disk into one line. Others may have filled the disk since the check."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not any(isinstance(each, OSError) and each.errno in _FULL for each in _chain(error)):
            raise
        raise UserError(
            f"{output}: no space was left on its file system while it was written; it needs "
            f"{described_bytes(needed)}; nothing of it was kept"
        ) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those before it. torch's serializer raises its own error while it handles a failed write."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

"""The command `doctor`: what this machine can run, and what each missing library costs."""

import contextlib
import importlib
import json
import os
import shutil
import sys
import textwrap
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import click
from packaging.requirements import Requirement

from megatron_solopo.architecture.gpus import FP8_QUESTIONS
from megatron_solopo.cpu_features import has_bfloat16_kernels

CheckStatus = Literal["ok", "warn", "missing", "fail"]

_GIB = 1024**3
_CHECKPOINT_BYTES_PER_PARAMETER = 14  # bfloat16 weights, float32 master weights and two Adam moments
_CHECKPOINTS = 4  # checkpoint.keep_last is 3, and one more is being written
_LOW_DISK_GIB = 10
_TESTED_PYTHONS = ((3, 11), (3, 12))

# Distribution -> module of required libraries. Only an import shows that a binary is broken.
_IMPORTED = {
    "torch": "torch",
    "numpy": "numpy",
    "transformers": "transformers",
    "datasets": "datasets",
    "safetensors": "safetensors.torch",
    "sentencepiece": "sentencepiece",
    "tensorboard": "tensorboard",
}


@dataclass(frozen=True)
class Check:
    """The result for one library, device or resource.

    ok: it works. warn: it works, with the drawback in `consequence`. missing: it is optional and absent. fail: it is
    required, and absent, broken or of an unsupported version.
    """

    name: str
    status: CheckStatus
    found: str
    consequence: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks of this machine."""

    checks: list[Check]

    @property
    def healthy(self) -> bool:
        """Whether everything required works. Optional libraries may be missing."""
        return all(check.status != "fail" for check in self.checks)

    def to_json(self) -> str:
        """`{"healthy": bool, "checks": [{"name", "status", "found", "consequence", "remedy"}]}`, indented."""
        return json.dumps({"healthy": self.healthy, "checks": [asdict(check) for check in self.checks]}, indent=2)

    def render(self, width: int | None = None) -> str:
        """An aligned table of at most `width` columns (default: the terminal's, up to 120)."""
        columns = max(width or min(shutil.get_terminal_size().columns, 120), 60)
        name_width = max(len(check.name) for check in self.checks)
        lines = [line for check in self.checks for line in _render(check, name_width, columns)]
        failed = [check.name for check in self.checks if check.status == "fail"]
        return "\n".join([*lines, "", f"not ready: {', '.join(failed)}" if failed else "ready"])


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def doctor(as_json: bool) -> None:
    """Show what is installed and works on this machine, and what each missing library costs.

    The exit code is 1 if something required is missing.

    \b
    Example:
      megatron-solopo doctor
    """
    diagnosis = diagnose()
    click.echo(diagnosis.to_json() if as_json else diagnosis.render())
    if not diagnosis.healthy:
        sys.exit(1)


def _render(check: Check, name_width: int, columns: int) -> list[str]:
    head = f"{check.status:<9}{check.name:<{name_width}}  "
    indent = " " * len(head)
    wrapper = textwrap.TextWrapper(
        columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, initial_indent=head
    )
    lines = wrapper.wrap(check.found)
    wrapper.initial_indent = indent
    for detail in (check.consequence, check.remedy and f"fix: {check.remedy}"):
        lines += wrapper.wrap(detail)
    return lines


def diagnose() -> Diagnosis:
    """Check this machine. A library that is absent, or does not import, never raises."""
    accelerated = [*_transformer_engine(), _flash_attention(), _apex(), _deep_ep()]
    return Diagnosis([_python(), *_requirements(), *_devices(), *accelerated, _wandb(), *_machine()])


def _python() -> Check:
    found = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] in _TESTED_PYTHONS:
        return Check("python", "ok", found)
    return Check("python", "warn", found, "tested only on 3.11 and 3.12", "use Python 3.11 or 3.12")


def _requirements() -> Iterator[Check]:
    """One check for each library that is imported or whose version matters, and one for all others."""
    requirements = _declared_requirements()
    if not requirements:
        cost = "the versions of the required libraries are not checked"
        yield Check("dependencies", "warn", "megatron-solopo is not installed", cost, "pip install megatron-solopo")
        return
    others = []
    for requirement in requirements:
        check = _requirement(requirement)
        if check.status == "fail" or requirement.name in ("megatron-core", *_IMPORTED):
            yield check
        else:
            others.append(f"{check.name} {check.found}")
    if others:
        yield Check("others", "ok", ", ".join(others))


def _declared_requirements() -> list[Requirement]:
    """The required libraries on this Python, from the checkout's pyproject.toml or else from the installed package."""
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    declared: list[str] = []
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
        declared = project.get("dependencies", []) if project.get("name") == "megatron-solopo" else []
    if not declared:
        with contextlib.suppress(metadata.PackageNotFoundError):
            declared = metadata.requires("megatron-solopo") or []
    requirements = [Requirement(text) for text in declared]
    return [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]


def _requirement(requirement: Requirement) -> Check:
    name = requirement.name
    remedy = f"pip install '{name}{requirement.specifier}'"
    version = _version(name)
    if version is None:
        return Check(name, "fail", "not installed", "megatron_solopo does not run without it", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
        return Check(name, "fail", version, f"not supported; with {python}: {requirement.specifier}", remedy)
    if name in _IMPORTED:
        module, reason = _import(_IMPORTED[name])
        if module is None:
            remedy = f"pip install --force-reinstall '{name}{requirement.specifier}'"
            return Check(name, "fail", f"{version} does not import: {reason}", "required", remedy)
    return Check(name, "ok", version)


def _devices() -> Iterator[Check]:
    torch, reason = _import("torch")
    if torch is None:
        yield Check("gloo", "fail", f"torch does not import: {reason}", "nothing runs", "install torch")
        return
    yield from _gpus(torch)
    yield _cpu_bfloat16()
    distributed = torch.distributed
    nccl = distributed.is_available() and distributed.is_nccl_available()
    gloo = distributed.is_available() and distributed.is_gloo_available()
    cost = "GPUs cannot talk to each other; no loss on CPUs"
    yield _backend("NCCL", nccl, "missing", cost, "install a CUDA build of torch")
    yield _backend("gloo", gloo, "fail", "no run on the CPU, no tests", "install an official build of torch")


def _backend(name: str, available: bool, otherwise: CheckStatus, cost: str, remedy: str) -> Check:
    return Check(name, "ok", "available") if available else Check(name, otherwise, "not in this torch", cost, remedy)


def _gpus(torch: Any) -> Iterator[Check]:
    cost = "runs on the CPU over gloo: for tests and small runs"
    if not torch.version.cuda:
        yield Check("CUDA", "missing", "this build of torch is for the CPU", cost, "install a CUDA build of torch")
        return
    try:
        torch.cuda.init()
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except Exception as error:
        found = f"{torch.version.cuda}, no usable device: {_reason(error)}"
        yield Check("CUDA", "missing", found, cost, "on a GPU machine, look at nvidia-smi and the driver")
        return
    yield Check("CUDA", "ok", f"{torch.version.cuda}, {len(devices)} devices")
    for index, device in enumerate(devices):
        found = f"{device.name}, {device.total_memory / _GIB:.0f} GiB, compute capability {device.major}.{device.minor}"
        if device.major >= 8:
            yield Check(f"GPU {index}", "ok", found)
        else:
            yield Check(f"GPU {index}", "warn", found, "no bfloat16 tensor cores", "use an Ampere or newer GPU")


def _cpu_bfloat16() -> Check:
    if has_bfloat16_kernels():
        return Check("CPU bfloat16", "ok", "torch has kernels for this CPU")
    cost = "on the CPU, bfloat16 is several times slower than float32; no loss on GPUs"
    remedy = "on the CPU, set model.dtype=float32"
    return Check("CPU bfloat16", "missing", "torch has no kernels for this CPU", cost, remedy)


def _transformer_engine() -> list[Check]:
    engine, check = _optional(
        "transformer-engine",
        "transformer_engine.pytorch",
        "plain PyTorch layers, no FP8: slower and with more memory on GPUs, no loss on CPUs",
        "on a GPU machine: pip install --no-build-isolation 'megatron-solopo[te]'",
    )
    return [check] if engine is None else [check, _fp8(engine)]


def _fp8(engine: Any) -> Check:
    """Ask Transformer Engine which recipes of `model.fp8_recipe` the current device computes."""
    cost = "linear layers run in bfloat16 or float32"
    remedy = "use a GPU of compute capability 8.9 (Ada), 9.0 (Hopper) or newer"
    try:
        if not importlib.import_module("torch").cuda.is_available():
            return Check("FP8", "missing", "no CUDA device", cost, remedy)
        answers = {recipe: getattr(engine, ask)(return_reason=True) for recipe, ask in FP8_QUESTIONS.items()}
    except Exception as error:
        found = f"Transformer Engine cannot tell: {_reason(error)}"
        return Check("FP8", "warn", found, cost, "use Transformer Engine 2.9 or newer")
    works = [recipe for recipe, (available, _) in answers.items() if available]
    reasons = {recipe: " ".join(str(reason).split()).rstrip(".") for recipe, (_, reason) in answers.items()}
    if not works:
        return Check("FP8", "missing", reasons["tensorwise"], cost, remedy)
    if "blockwise" in works:
        return Check("FP8", "ok", f"works on this device: {', '.join(works)}")
    found = f"works: {', '.join(works)}; not blockwise, the default: {reasons['blockwise']}"
    return Check(
        "FP8", "warn", found, "model.fp8 alone is refused", f"set model.fp8_recipe to one of: {', '.join(works)}"
    )


def _flash_attention() -> Check:
    cost = "Transformer Engine takes cuDNN's attention kernels; no loss on CPUs"
    remedy = "on a GPU machine: pip install --no-build-isolation flash-attn"
    return _optional("flash-attn", "flash_attn", cost, remedy)[1]


def _deep_ep() -> Check:
    cost = "parallel.moe_token_dispatcher_type=flex is refused; experts get their tokens by all-to-all"
    return _optional(
        "deep_ep", "deep_ep", cost, "on a GPU machine: build it from https://github.com/deepseek-ai/DeepEP"
    )[1]


def _wandb() -> Check:
    cost = "no Weights & Biases; runs still write metrics.jsonl and TensorBoard files"
    return _optional("wandb", "wandb", cost, "pip install 'megatron-solopo[wandb]'")[1]


def _optional(distribution: str, module_name: str, cost: str, remedy: str) -> tuple[Any, Check]:
    version = _version(distribution)
    module, reason = _import(module_name)
    if module is not None:
        return module, Check(distribution, "ok", version or "version unknown")
    if version is None:
        return None, Check(distribution, "missing", "not installed", cost, remedy)
    return None, Check(distribution, "warn", f"{version} does not import: {reason}", cost, remedy)


def _apex() -> Check:
    """Tell NVIDIA Apex from the other package of that name on PyPI, without an import of either."""
    cost = "a separate step accumulates weight gradients, a little slower on GPUs; no loss on CPUs"
    remedy = "on a GPU machine: build it from https://github.com/NVIDIA/apex (`pip install apex` is another package)"
    version = _version("apex")
    spec = find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if version is None and spec is None:
        return Check("NVIDIA Apex", "missing", "not installed", cost, remedy)
    if not any((Path(folder) / "optimizers").is_dir() for folder in folders):
        found = f"apex {version or 'of unknown version'} is not NVIDIA's, but another package of that name"
        return Check("NVIDIA Apex", "warn", found, "it has no use here and hides NVIDIA's", "pip uninstall apex")
    unbuilt = [name for name in ("amp_C", "fused_weight_gradient_mlp_cuda") if find_spec(name) is None]
    if unbuilt:
        return Check("NVIDIA Apex", "warn", f"built without {' and '.join(unbuilt)}", cost, remedy)
    return Check("NVIDIA Apex", "ok", version or "version unknown")


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("CPU cores", "ok", f"{cores} usable")
    psutil, _ = _import("psutil")
    if psutil is not None:
        memory = psutil.virtual_memory()
        yield Check("memory", "ok", f"{memory.available / _GIB:.1f} GiB free of {memory.total / _GIB:.1f} GiB")
    free = shutil.disk_usage(Path.cwd()).free
    billions = free / _CHECKPOINT_BYTES_PER_PARAMETER / 1e9
    found = (
        f"{free / _GIB:.1f} GiB free in {Path.cwd()}: one checkpoint of up to {billions:.2g} billion parameters, or "
        f"the {_CHECKPOINTS} of checkpoint.keep_last=3 and a running save for up to "
        f"{billions / _CHECKPOINTS:.2g} billion"
    )
    if free >= _LOW_DISK_GIB * _GIB:
        yield Check("disk", "ok", found)
    else:
        cost = f"a checkpoint takes {_CHECKPOINT_BYTES_PER_PARAMETER} bytes per parameter, and a run keeps several"
        yield Check("disk", "warn", found, cost, "set run_dir to a larger file system, or lower checkpoint.keep_last")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _import(name: str) -> tuple[Any, str]:
    """Return the module, or None and the reason. Its output goes to stderr, so that `--json` stays JSON."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name), ""
        except (Exception, SystemExit) as error:
            return None, _reason(error)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

"""Runs Megatron-Core on a machine without CUDA: the only place that adapts `torch.cuda`.

Megatron-Core asks `torch.cuda` for devices, streams, random states and memory without checking that CUDA is there.
`adapt_if_needed` gives each of these its meaning on a CPU. It must run before megatron is imported. It does nothing
where CUDA is available, unless MEGATRON_SOLOPO_DEVICE=cpu.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.utils._device import _device_constructors

from megatron_solopo.cpu_features import is_cpu

_CPU = torch.device("cpu")
# fmt: off
_FACTORIES = (
    "zeros", "ones", "empty", "tensor", "full", "arange", "rand", "randn", "randint",
    "zeros_like", "ones_like", "empty_like", "as_tensor",
)
# fmt: on
_adapted = False


def adapt_if_needed() -> None:
    """Give `torch.cuda` its meaning on a CPU, once, if this process computes on the CPU."""
    global _adapted
    if _adapted or not is_cpu():
        return
    _adapted = True
    _hide_gpu_libraries()
    _adapt_device_and_random_state()
    _adapt_streams()
    _adapt_tensors()
    _share_gloo_device()
    _let_gloo_exchange_what_experts_need()
    _let_megatron_run_line_by_line()


def _hide_gpu_libraries() -> None:
    """Hide Transformer Engine and Apex. Megatron uses their optimizers if they import, but their kernels need CUDA."""
    for name in ("transformer_engine", "apex"):
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]


class _Event:
    """A point in the only stream of a CPU, always reached."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    """The only stream of a CPU. It runs everything in order, so nothing waits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


class _Generators:
    """The CPU's generator for every device."""

    def __getitem__(self, device: Any) -> torch.Generator:
        return torch.default_generator


def _adapt_device_and_random_state() -> None:
    cuda: Any = torch.cuda
    # torch may count devices to answer this, and below there is one.
    available = cuda.is_available()
    cuda.is_available = lambda: available
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    # One function object per name: torch.compile refuses a function that has two.
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = _seed
    # Megatron sets states through the device's generator, as soon as CUDA is initialised: here, at once.
    cuda.default_generators = _Generators()
    cuda._lazy_call = lambda call, **kwargs: call()
    # Compute capability 0.0 is older than any GPU, so Megatron chooses no kernel of a GPU.
    cuda.get_device_properties = lambda device=None: SimpleNamespace(name="cpu", major=0, minor=0)


def _adapt_streams() -> None:
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *args: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()


def _adapt_tensors() -> None:
    cuda: Any = torch.cuda
    cuda.FloatTensor, cuda.LongTensor, cuda.IntTensor = torch.FloatTensor, torch.LongTensor, torch.IntTensor
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    # `with torch.device(...)` makes a table of the factories at its first use. It must hold the originals.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Gradient clipping asserts that the type of gradients is called 'torch.cuda.FloatTensor'.
        result = tensor_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = type_as_on_cuda  # type: ignore[method-assign, assignment]


def _share_gloo_device() -> None:
    """Let all process groups of this process wait for messages in one thread.

    torch gives every group a thread of its own, which looks for messages a hundred times a second. Megatron has dozens
    of groups, so these threads would take most of the time of tests on few cores.
    """
    if not dist.is_gloo_available():
        return
    group_class: Any = dist.ProcessGroupGloo
    initialize = group_class.__init__

    def initialize_shared(self: Any, store: Any, rank: int, size: int, timeout: timedelta = default_pg_timeout) -> None:
        options = group_class._Options()
        options._devices, options._timeout = _gloo_devices(), timeout
        initialize(self, store, rank, size, options)

    group_class.__init__ = initialize_shared


def _let_gloo_exchange_what_experts_need() -> None:
    """Adapt three collectives. NCCL takes split sizes as tensors, and lists of tensors of different lengths."""
    library: Any = dist
    all_to_all_single, all_gather, reduce_scatter = dist.all_to_all_single, dist.all_gather, dist.reduce_scatter

    def listed(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    def exchange(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **more: Any
    ) -> Any:
        return all_to_all_single(output, input, listed(output_split_sizes), listed(input_split_sizes), **more)

    def gather(tensor_list: list[Any], tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        lengths = [len(each) for each in tensor_list] if tensor.dim() else []
        if len(set(lengths)) < 2:
            return all_gather(tensor_list, tensor, group, async_op)
        assert not async_op, "the results are copied at once"
        padded = [_padded(tensor, max(lengths)) for _ in lengths]
        all_gather(padded, _padded(tensor, max(lengths)), group)
        for target, found in zip(tensor_list, padded, strict=True):
            target.copy_(found[: len(target)])
        return None

    def scatter(output: Any, input_list: list[Any], op: Any = dist.ReduceOp.SUM, group: Any = None, **more: Any) -> Any:
        lengths = [len(each) for each in input_list] if output.dim() else []
        if len(set(lengths)) < 2:
            return reduce_scatter(output, input_list, op, group, **more)
        assert not more, "the result is copied at once"
        padded = _padded(output, max(lengths))
        reduce_scatter(padded, [_padded(each, max(lengths)) for each in input_list], op, group)
        output.copy_(padded[: len(output)])
        return None

    library.all_to_all_single, library.all_gather, library.reduce_scatter = exchange, gather, scatter


def _padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """A copy with more rows, which hold zeros."""
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])


def _let_megatron_run_line_by_line() -> None:
    """Leave Megatron's fused functions as they are: compiling them pays on a GPU alone.

    Megatron decorates them with torch.compile when it is imported. The compiler's own import takes a second.
    """
    library: Any = torch
    compile_ = torch.compile

    @functools.wraps(compile_)
    def compile_others(model: Any = None, **options: Any) -> Any:
        is_megatron = (getattr(model, "__module__", None) or "").startswith("megatron.")
        return model if is_megatron else compile_(model, **options)

    library.compile = compile_others


@functools.cache
def _gloo_devices() -> list[Any]:
    """Return the devices that torch would choose: those of the named interfaces, or the default one."""
    names = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if not names:
        return [dist.ProcessGroupGloo.create_default_device()]
    return [dist.ProcessGroupGloo.create_device(interface=name) for name in names.split(",")]


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a tensor factory that takes device='cuda' for the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _seed(seed: int) -> None:
    torch.manual_seed(seed)

"""`torch.cuda` and CUDA tensors of one GPU, beyond what Megatron-Core asks for; gloo where NCCL allows more.

`megatron_solopo.parallel.cpu` answers Megatron-Core. This answers Transformer Engine and the project's own questions.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

DEVICES = {
    "hopper": SimpleNamespace(name="emulated H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30),
    "blackwell": SimpleNamespace(
        name="emulated B200", major=10, minor=0, multi_processor_count=148, total_memory=180 << 30
    ),
}
GPU = DEVICES[os.environ.get("EMULATED_GPU", "hopper")]
"""The emulated one. The variable reaches subprocesses, too."""
IS_BLACKWELL = GPU.major == 10


def emulate_gpu() -> None:
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda device=None: GPU
    cuda.get_device_capability = lambda device=None: (GPU.major, GPU.minor)
    cuda.is_current_stream_capturing = lambda: False
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 8
    cuda.init = lambda: None
    cuda.get_device_name = lambda device=None: GPU.name
    torch.accelerator.current_accelerator = lambda check_available=False: None  # else torch's Adam asks for a stream
    cuda.Event = _timed(cuda.Event)
    # No memory is measured here.
    for name in ("max_memory_allocated", "memory_allocated", "max_memory_reserved", "memory_reserved"):
        setattr(cuda, name, lambda device=None: 0)
    cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.memory._record_memory_history = lambda enabled="all": None
    cuda.memory._dump_snapshot = lambda file: Path(file).touch()
    profiler: Any = torch.profiler
    # torch's build for CUDA would warn of a missing driver at every operation.
    profiler.profile = functools.partial(_profile_cpu, profiler.profile)
    if torch.version.cuda is None:
        torch.version.cuda = "13.0"  # Transformer Engine compares it
    _emulate_tensors()


def _profile_cpu(profile: Callable[..., Any], *, activities: Any = None, **kwargs: Any) -> Any:
    return profile(activities=[torch.profiler.ProfilerActivity.CPU], **kwargs)


def _timed(event: Any) -> type:
    """An event that knows when the host recorded it; the host's time is the device's here."""

    class TimedEvent(event):  # type: ignore[misc]
        def record(self, *args: Any) -> None:
            self.moment = time.perf_counter()

        def elapsed_time(self, end: Any) -> float:
            return (end.moment - self.moment) * 1000

    return TimedEvent


def _emulate_tensors() -> None:
    from megatron_solopo.parallel.cpu import _FACTORIES  # the package must be imported without a GPU

    tensor: Any = torch.Tensor
    # What went through `.cpu()` says that it is on the host: Megatron-Core's offloaded optimizer asks.
    tensor.is_cuda = property(lambda self: not getattr(self, "_on_host", False))
    tensor.cpu = lambda self, *args, **kwargs: _on_host(self.clone())
    for name in ("detach", "clone", "float"):
        setattr(tensor, name, _staying_on_host(getattr(tensor, name)))
    for name in ("to", "new_empty", "new_zeros", "new_ones", "new_tensor"):
        setattr(tensor, name, _without_cuda(getattr(tensor, name)))
    tensor.to = _by_number(tensor.to)
    tensor.pin_memory = lambda self, *args: self
    tensor.record_stream = lambda self, stream: None
    empty = torch.empty
    torch.empty = lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs)
    for name in (*_FACTORIES, "full_like", "rand_like", "randn_like"):
        setattr(torch, name, _without_cuda(getattr(torch, name)))


def _on_host(tensor: Any) -> Any:
    tensor._on_host = True
    return tensor


def _staying_on_host(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        return _on_host(result) if getattr(self, "_on_host", False) else result

    return call


def _without_cuda(method: Callable[..., Any]) -> Callable[..., Any]:
    def here(argument: Any) -> Any:
        names_cuda = isinstance(argument, (str, torch.device)) and "cuda" in str(argument)
        return torch.device("cpu") if names_cuda else argument

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("device"), int):  # as `torch.cuda.current_device` names one
            kwargs["device"] = "cuda"
        return method(*map(here, args), **{name: here(value) for name, value in kwargs.items()})

    return call


def _by_number(to: Callable[..., Any]) -> Callable[..., Any]:
    """`to(0)`: the first device."""

    @functools.wraps(to)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = ["cuda" if isinstance(each, int) and not isinstance(each, bool) else each for each in args[:1]]
        return to(self, *first, *args[1:], **kwargs)

    return call


def let_gloo_be_nccl() -> None:
    """Who asks for NCCL gets gloo, and hears that it is NCCL."""
    distributed: Any = torch.distributed
    start, make_group, barrier = distributed.init_process_group, distributed.new_group, distributed.barrier
    get_backend = distributed.get_backend
    asked = []

    def gloo(backend: Any) -> Any:
        return "gloo" if "nccl" in str(backend) else backend

    def init_process_group(backend: Any = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        start(gloo(backend), *args, **kwargs)
        asked[:] = [backend]

    def new_group(*args: Any, backend: Any = None, device_id: Any = None, **kwargs: Any) -> Any:
        return make_group(*args, backend=gloo(backend), **kwargs)

    distributed.init_process_group, distributed.new_group = init_process_group, new_group
    distributed.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)
    distributed.get_backend = lambda group=None: "nccl" if asked == ["nccl"] else get_backend(group)


def gather_one_by_one() -> None:
    """gloo's coalesced all-gather mixes up tensors of different types: FP8 weights beside bfloat16 ones."""

    from torch.distributed import distributed_c10d as c10d

    library: Any = c10d
    noted = library._world.pg_coalesce_state

    @contextlib.contextmanager
    def one_by_one(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
        """What the block asks for is noted, as torch does it, and begins at the block's end."""
        group = group or library._get_default_group()
        noted[group] = []
        together = library._CoalescingManager()
        yield together
        for asked in noted.pop(group):
            tensors = [tensor for tensor in (asked.dst_tensor, asked.tensor) if tensor is not None]
            operation = [] if asked.redop is None else [asked.redop]
            together.append(asked.op(*tensors, *operation, group=group, async_op=async_ops))

    torch.distributed._coalescing_manager = library._coalescing_manager = one_by_one


def keep_fused_functions_in_float32() -> None:
    """What torch.compile fuses rounds to bfloat16 at its end alone. Line by line it would round each operation."""
    from megatron.core.fusions import fused_bias_swiglu

    for name in ("swiglu", "bias_swiglu", "weighted_swiglu", "swiglu_back", "bias_swiglu_back"):
        setattr(fused_bias_swiglu, name, _in_float32(getattr(fused_bias_swiglu, name)))


def _in_float32(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return function(*(tensor.float() for tensor in tensors)).to(tensors[0].dtype)

    return call


def wait_once_for_each_message() -> None:
    """Transformer Engine waits twice for a message of context parallelism. NCCL allows it; gloo awaits another one."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    exchange = context_parallel.flash_attn_p2p_communicate
    context_parallel.flash_attn_p2p_communicate = lambda *args: [WaitOnce(work) for work in exchange(*args)]


class WaitOnce:
    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

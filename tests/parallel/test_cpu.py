"""The CPU meaning of torch.cuda: asked for by name, complete enough for Megatron-Core, out of everyone else's way."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_solopo.cpu_features import is_cpu
from megatron_solopo.parallel import cpu
from tests.ranks import layout

on_cpu = pytest.mark.skipif(not is_cpu(), reason="torch.cuda is not adapted where there is CUDA")
FACTORIES = [
    ("zeros", (2,)),
    ("ones", (2,)),
    ("empty", (2,)),
    ("tensor", ([1.0, 2.0],)),
    ("full", ((2,), 3.0)),
    ("arange", (2,)),
    ("rand", (2,)),
    ("randn", (2,)),
    ("randint", (5, (2,))),
    ("zeros_like", (torch.zeros(2),)),
    ("ones_like", (torch.zeros(2),)),
    ("empty_like", (torch.zeros(2),)),
    ("as_tensor", ([1.0, 2.0],)),
]


@on_cpu
def test_the_device_that_stands_for_the_cpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch with CUDA counts devices to say whether there is a GPU, if NVML is to answer."""
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    assert torch.cuda.device_count() == 1 and not torch.cuda.is_available()
    assert is_cpu()


@on_cpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0), torch.cuda.current_device()], ids=str)
@pytest.mark.parametrize(("name", "arguments"), FACTORIES, ids=[name for name, _ in FACTORIES])
def test_a_factory_takes_a_cuda_device_for_the_cpu(name, arguments, device) -> None:
    made = getattr(torch, name)(*arguments, device=device)
    assert made.device.type == "cpu" and made.shape == (2,)


@on_cpu
def test_every_adapted_factory_is_tested() -> None:
    assert {name for name, _ in FACTORIES} == set(cpu._FACTORIES)


@on_cpu
@pytest.mark.parametrize(("name", "arguments"), FACTORIES, ids=[name for name, _ in FACTORIES])
def test_the_meta_device_still_works(name, arguments) -> None:
    assert getattr(torch, name)(*arguments, device="meta").is_meta
    with torch.device("meta"):
        # What is made like another tensor goes where that one is.
        assert getattr(torch, name)(*arguments).is_meta is not name.endswith("_like")
        assert torch.nn.Linear(2, 3).weight.is_meta
    assert getattr(torch, name)(*arguments).device.type == "cpu"


@on_cpu
def test_a_cpu_is_older_than_any_gpu() -> None:
    properties = torch.cuda.get_device_properties(torch.device("cuda:0"))
    assert (properties.name, properties.major, properties.minor) == ("cpu", 0, 0)


@on_cpu
def test_streams_events_and_seeds_do_what_the_cpu_does() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        event = torch.cuda.current_stream().record_event()
    assert event.query() and torch.cuda.device_count() == 1
    torch.cuda.manual_seed(3)
    state, first = torch.cuda.get_rng_state(), torch.rand(4)
    assert torch.equal(first, torch.rand(4, generator=torch.Generator().manual_seed(3)))
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


@on_cpu
def test_megatron_keeps_random_states_by_name() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(3)
    outside = torch.rand(4)
    tracker.add("dropout", 3)
    for _ in range(2):
        torch.manual_seed(4)
        with tracker.fork("dropout"):
            drawn = torch.rand(4)
        assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(4)))
    assert not torch.equal(drawn, outside), "the second draw goes on where the first ended"
    both = torch.rand(8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat([outside, drawn]), both)


@on_cpu
def test_a_tensor_moves_nowhere_and_casts_as_before() -> None:
    value = torch.ones(2)
    assert value.cuda() is value and value.type() == "torch.cuda.FloatTensor"
    assert value.type(torch.float64).dtype is torch.float64


@on_cpu
def test_adapting_again_changes_nothing() -> None:
    def current() -> list[object]:
        return [torch.zeros, torch.cuda.Stream, torch.cuda.current_device, torch.Tensor.type, torch.Tensor.cuda]

    before = current()
    cpu.adapt_if_needed()
    assert all(now is then for now, then in zip(current(), before, strict=True))


def test_megatron_on_a_cpu_does_not_take_the_gpu_libraries_that_are_installed(tmp_path: Path) -> None:
    for name in ("transformer_engine", "apex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('{name} was imported')")
    program = "import megatron_solopo.train.policy as o; from megatron.core import optimizer; print(optimizer.Adam)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"MEGATRON_SOLOPO_DEVICE": "cpu", "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "<class 'torch.optim.adamw.AdamW'>", done.stderr


def test_megatron_warns_of_everything_but_the_libraries_that_are_not_installed() -> None:
    program = """
import warnings
import megatron_solopo.train.policy
warnings.warn_explicit("another matter", UserWarning, "file.py", 1, module="megatron.core.optimizer")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "another matter" in done.stderr and "not installed" not in done.stderr, done.stderr


@on_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_process_groups_wait_for_messages_in_one_thread() -> None:
    def loops() -> int:
        names = (task / "comm" for task in Path("/proc/self/task").iterdir())
        return sum(name.read_text().strip() == "gloo_tcp_loop" for name in names)

    with layout():
        before = loops()
        groups = [dist.new_group(backend="gloo", timeout=timedelta(seconds=10 + number)) for number in range(5)]
        assert loops() == before == 1
        assert all(isinstance(backend(group), dist.ProcessGroupGloo) for group in groups)
        assert [backend(group).options._timeout.total_seconds() for group in groups] == [10, 11, 12, 13, 14]


def backend(group: Any) -> Any:
    return group._get_backend(torch.device("cpu"))


@on_cpu
def test_training_imports_no_compiler() -> None:
    """Megatron decorates functions with torch.compile. Its import would take a second of every process."""
    command = (
        "import sys, torch, megatron_solopo.train.trainer; from megatron.core.fusions import fused_bias_swiglu; "
        "assert fused_bias_swiglu.jit_fuser is torch.compile; "
        "print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules]); "
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item(), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "2.0 True"]

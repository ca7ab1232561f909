"""Where a rank stands among the others, and which world sizes are refused."""

import resource
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_solopo.config import ParallelConfig
from megatron_solopo.errors import UserError
from megatron_solopo.parallel import topology
from megatron_solopo.train import session
from tests.ranks import layout, two_ranks

TP2, CP2, PP2 = ({f"{name}_parallel_size": 2} for name in ("tensor_model", "context", "pipeline_model"))
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {"dp2": {}, "tp2": TP2, "cp2": CP2, "pp2": PP2, "vpp2": VPP2}


def on_two_ranks() -> dict[str, Any]:
    """What each layout says about this rank."""
    return {name: describe(sizes) for name, sizes in LAYOUTS.items()}


def describe(sizes: dict[str, Any]) -> dict[str, Any]:
    with layout(**sizes) as groups:
        return {
            "sequence_multiple": groups.sequence_multiple,
            "pack_multiple": groups.pack_multiple(),
            "packs_multiple": groups.packs_multiple,
            "is_last_stage": groups.is_last_stage,
            "last_stage_rank": groups.last_stage_rank,
            "data_size": groups.data_group.size(),
        }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dp2", {"sequence_multiple": 1, "pack_multiple": 1, "packs_multiple": 1, "data_size": 2}),
        ("tp2", {"sequence_multiple": 1, "pack_multiple": 2, "packs_multiple": 1, "data_size": 1}),
        ("cp2", {"sequence_multiple": 4, "pack_multiple": 4, "packs_multiple": 1, "data_size": 1}),
        ("pp2", {"sequence_multiple": 1, "pack_multiple": 1, "packs_multiple": 1, "data_size": 1}),
        ("vpp2", {"sequence_multiple": 1, "pack_multiple": 1, "packs_multiple": 2, "data_size": 1}),
    ],
)
def test_sequences_and_packs_come_in_the_layouts_multiples(name, expected) -> None:
    for found in two_ranks(__name__):
        assert {key: found[name][key] for key in expected} == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_last_stage_computes_the_loss(name) -> None:
    found = [rank[name] for rank in two_ranks(__name__)]
    is_pipelined = "pp" in name
    assert [rank["is_last_stage"] for rank in found] == ([False, True] if is_pipelined else [True, True])
    assert [rank["last_stage_rank"] for rank in found] == ([1, 1] if is_pipelined else [0, 1])


def test_one_process_makes_its_own_world_and_ends_it() -> None:
    with layout() as groups:
        assert groups.owns_world and dist.get_world_size() == 1
        assert groups.is_last_stage and groups.sequence_multiple == 1
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("limits", "world_size", "expected"),
    [
        ((1024, 524_288), 8, (1104, 524_288)),
        ((1024, 524_288), 1024, (11_264, 524_288)),
        ((1024, 4096), 1024, (4096, 4096)),
        ((1024, resource.RLIM_INFINITY), 1024, (11_264, resource.RLIM_INFINITY)),
        ((65_536, 65_536), 1024, None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 1024, None),
    ],
)
def test_a_process_may_open_a_socket_to_every_rank(limits, world_size, expected, monkeypatch) -> None:
    changed = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: changed.append(new))
    topology._allow_sockets(world_size)
    assert changed == ([] if expected is None else [expected])


def test_a_wrong_world_size_is_refused_before_any_process_waits(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes, but"):
        topology.initialize(ParallelConfig(**TP2), seed=1)
    assert not dist.is_initialized()


def test_copies_of_the_optimizer_must_divide_the_ranks(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="num_distributed_optimizer_instances=3 does not divide the 2 ranks"):
        topology.initialize(ParallelConfig(**TP2, num_distributed_optimizer_instances=3), seed=1)


@pytest.mark.parametrize(
    "keys",
    [
        {"num_distributed_optimizer_instances": 2},
        {"cp_comm_type": "a2a+p2p", "context_parallel_size": 4, "hierarchical_context_parallel_sizes": [2, 2]},
    ],
)
def test_groups_within_groups_need_einops(monkeypatch, keys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package einops; install it with `pip install einops`"):
        topology.initialize(ParallelConfig(**keys), seed=1)
    assert not dist.is_initialized()


def test_lone_tasks_of_a_slurm_step_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError) as error:
        topology.initialize(ParallelConfig(), seed=1)
    message = str(error.value)
    assert "srun started 4 tasks" in message and "torchrun" in message and "\n" not in message
    assert not dist.is_initialized()


_ALLOCATOR, _QUEUES = "PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    ("sizes", "given", "expected"),
    [
        ({}, {}, {_ALLOCATOR: "expandable_segments:True"}),
        (TP2, {}, {_ALLOCATOR: "expandable_segments:True", _QUEUES: "1"}),
        (CP2, {_QUEUES: "8"}, {_ALLOCATOR: "expandable_segments:True", _QUEUES: "8"}),
        ({}, {_ALLOCATOR: "backend:native"}, {_ALLOCATOR: "backend:native"}),
        ({}, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
    ],
)
def test_cuda_is_prepared_without_touching_what_the_user_has_set(monkeypatch, sizes, given, expected) -> None:
    environment = dict(given)
    monkeypatch.setattr(topology.os, "environ", environment)
    topology._prepare_cuda(ParallelConfig(**sizes))
    assert environment == expected


def test_cuda_does_not_start_before_its_settings(monkeypatch) -> None:
    """torch's usual answer to `is_available` starts CUDA's driver, which then ignores a later setting."""
    asked = []
    monkeypatch.delenv("MEGATRON_SOLOPO_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append(torch.cuda._nvml_based_avail()))
    topology.is_cpu()
    assert asked == [True]


def test_more_ranks_than_devices_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(topology, "is_cpu", lambda: False)
    monkeypatch.setattr(topology.os, "environ", {"LOCAL_RANK": "1"})  # where CUDA is adapted, there is one device
    with pytest.raises(UserError, match="LOCAL_RANK=1: this process sees 1 CUDA device"):
        topology.prepare_device(ParallelConfig())


def test_cuda_starts_with_the_runs_settings_on_the_ranks_device(monkeypatch, tmp_path) -> None:
    """Transformer Engine's answer about FP8 starts CUDA. torch's allocator reads its settings then."""
    calls = []
    monkeypatch.setattr(session.process_groups, "prepare_device", lambda config: calls.append("device"))
    monkeypatch.setattr(session, "resolve_model", lambda *args: calls.append("questions") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.check_and_join(mock.Mock())
    assert calls == ["device", "questions"]

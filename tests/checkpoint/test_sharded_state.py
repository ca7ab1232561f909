"""The sharded state of model and optimizer: each rank's share of it, and states of one Adam in another one."""

import math
import operator
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.checkpoint import sharded_state
from megatron_solopo.checkpoint.host_copies import HostCopies
from megatron_solopo.checkpoint.load import load_checkpoint
from megatron_solopo.checkpoint.save import ShardedSave, new_plans
from megatron_solopo.checkpoint.sharded_state import complete_group
from megatron_solopo.config import Config, parse_config
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel import megatron_internals
from megatron_solopo.parallel.agreement import on_rank_0
from megatron_solopo.parallel.megatron_internals import SavePlans, initialize_adam_state, optimizer_parts
from megatron_solopo.plan.memory import rank_state
from megatron_solopo.train.policy import Policy, build_policy
from tests.ranks import layout, two_ranks
from tests.tiny_models import VOCAB_SIZE, make_model
from tools.benchmarks.step_costs import peak_tensor_bytes

LAYOUTS: dict[str, dict[str, int]] = {
    "DP2": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "PP2xVPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}


def on_two_ranks() -> dict[str, Any]:
    """By layout: what this rank wrote and held, and whether it got what was saved; and each layout reads the last."""
    told: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    folder = Path(told[0])
    on_rank_0(lambda: str(make_model(folder / "model", "qwen2_tied")))
    found: dict[str, Any] = {name: saved_and_loaded(folder, name) for name in LAYOUTS}
    with trained(folder, {}) as policy:
        wanted = invent(policy)
        path = save_as_before(folder / "before", policy)
    with trained(folder, {}) as policy:
        load_checkpoint(path, policy.chunks, policy.optimizer)
        found["as before"] = same(held(policy), wanted)
    first, found["same"] = path, {}
    for name in [*LAYOUTS, "DP2"]:
        with trained(folder, LAYOUTS[name]) as policy:
            load_checkpoint(path, policy.chunks, policy.optimizer)
            path = save(folder / f"{path.parent.name} {name}", policy)
        found["same"][name] = on_rank_0(partial(differences, first, path))
    return found


def configuration(folder: Path, sizes: dict[str, int]) -> Config:
    section = {"model": {"path": folder / "model"}, "data": {"path": "unused", "max_tokens_per_pack": 100}}
    return parse_config(
        {"run_dir": "unused", "training": {"global_batch_size": 1}, "parallel": sizes} | section, source="test"
    )


@contextmanager
def trained(folder: Path, sizes: dict[str, int]) -> Iterator[Policy]:
    config = configuration(folder, sizes)
    with layout(**sizes) as groups:
        yield build_policy(config, resolve_model(config.model, config.parallel), groups, max_steps=10)


def save(root: Path, policy: Policy, copies: HostCopies | None = None, plans: SavePlans | None = None) -> Path:
    in_background = copies is not None
    return ShardedSave(
        root, policy.chunks, policy.optimizer, {"step": 1}, {}, copies=copies, in_background=in_background, plans=plans
    ).complete()


def saved_and_loaded(folder: Path, name: str) -> dict[str, Any]:
    with trained(folder, LAYOUTS[name]) as policy:
        wanted = invent(policy)
        paths: list[Path] = []
        peaks = [
            peak_tensor_bytes(lambda root=root, copies=copies: paths.append(save(root, policy, copies)))
            for root, copies in ((folder / name, None), (folder / f"{name} in the background", HostCopies()))
        ]
        for tensor in held(policy):
            tensor.zero_()
        load_checkpoint(paths[0], policy.chunks, policy.optimizer)
        ours = [tensor.clone() for tensor in held(policy)]
        found = {
            "as saved": same(ours, wanted),
            "written": written(paths[0], dist.get_rank()),
            "owned": sum(tensor.nbytes for tensor in [*weights(policy), *wanted]),
            "peaks": peaks,
        }
        if name == "DP2":
            found["as planned anew"] = saved_with_plans(folder, policy, paths[0])
            architecture = read_architecture(folder / "model")
            found["planned"] = rank_state(architecture, configuration(folder, {}), 0, 2, dist.get_rank()).saved
            load_as_megatron_does(paths[0], policy)
            found["as Megatron loads"] = same(ours, held(policy))
            found["in the background"] = on_rank_0(partial(differences, *paths))
        return found


def saved_with_plans(folder: Path, policy: Policy, wanted: Path) -> list[Any]:
    """Saves with the plans of the one before: how often all plans were gathered, and differences to `wanted`."""
    plans, found, gathers = new_plans(), [], []
    gather = _DistWrapper.gather_object

    def counted(*arguments: Any) -> Any:
        gathers.append(1)
        return gather(*arguments)

    for number in range(4):
        if (number, dist.get_rank()) == (2, 1):
            plans._pieces = []  # pieces have moved on one rank alone
        with mock.patch.object(_DistWrapper, "gather_object", counted):
            path = save(folder / f"with plans {number}", policy, plans=plans)
        found.append((len(gathers), on_rank_0(partial(differences, wanted, path))))
        assert not hasattr(FileSystemReader(path).read_metadata(), "all_local_plans")
    return found


def save_as_before(root: Path, policy: Policy) -> Path:
    """As earlier versions did: Megatron gathers the optimizer on one data-parallel rank, which also has the weights."""

    def gathered(optimizer: Any, model: dict[str, Any]) -> dict[str, Any]:
        metadata = sharded_state._metadata() | {"distrib_optim_fully_reshardable_mem_efficient": True}
        part = optimizer_parts(optimizer)[0]
        part.data_parallel_group_gloo = part.data_parallel_group  # Megatron made another group then
        state = optimizer.sharded_state_dict(sharded_state._by_parameter(model), is_loading=False, metadata=metadata)
        return {"optimizer": {key: value for key, value in state.items() if value is not None}}

    alone = mock.patch.object(sharded_state, "share_replicas", lambda model: None)
    with alone, mock.patch.object(sharded_state, "optimizer_state_to_save", gathered):
        path = save(root, policy)
    assert written(path, 0) and not written(path, 1)
    return path


def written(path: Path, rank: int) -> int:
    """Bytes of tensors in the files of a rank."""
    metadata = FileSystemReader(path).read_metadata()
    total = 0
    for key, entry in metadata.state_dict_metadata.items():
        for chunk in getattr(entry, "chunks", ()):  # with megatron-core 0.19 there is also an entry of bytes
            place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            if place.relative_path.startswith(f"__{rank}_"):
                total += chunk.sizes.numel() * entry.properties.dtype.itemsize
    return total


def differences(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not bitwise the same in two checkpoints. The vocabulary may be padded."""
    first, second = (read_whole(path) for path in (one, other))
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name][:VOCAB_SIZE], second[name][:VOCAB_SIZE])]


def read_whole(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def weights(policy: Policy) -> list[torch.Tensor]:
    return [parameter for chunk in policy.chunks for parameter in chunk.parameters()]


def inner(policy: Policy) -> Any:
    (optimizer,) = policy.optimizer.chained_optimizers
    return optimizer


def invent(policy: Policy) -> list[torch.Tensor]:
    """Give a policy a state that no other rank has, and the weights that go with it; returns a copy of the state."""
    initialize_adam_state(policy.optimizer)
    torch.manual_seed(dist.get_rank())
    for tensor in held(policy):
        tensor.normal_()
    for chunk in policy.chunks:  # in float32 the state is part of the weights
        chunk.start_param_sync(force_sync=True)
    return [tensor.clone() for tensor in held(policy)]


def held(policy: Policy) -> list[torch.Tensor]:
    """The master weights and moments of this rank, without counts of steps."""
    groups = inner(policy).optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    states = [inner(policy).optimizer.state[parameter] for parameter in parameters]
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    return [*(parameter.data for parameter in parameters), *moments]


def load_as_megatron_does(path: Path, policy: Policy) -> None:
    """The slow way: every rank asks for everything."""
    initialize_adam_state(policy.optimizer)
    model = sharded_state._by_parameter(sharded_state.model_state(policy.chunks))
    wanted = policy.optimizer.sharded_state_dict(model, is_loading=True, metadata=sharded_state._metadata())
    state = dist_checkpointing.load({"optimizer": wanted}, str(path))["optimizer"]
    steps = [state.pop("step") for state in inner(policy).optimizer.state.values()]  # it would ask for them
    inner(policy).load_parameter_state_from_fully_reshardable(state["param_state"])
    assert steps


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) > 0 and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_gets_its_share_to_the_last_bit(name: str) -> None:
    for rank in two_ranks(__name__):
        # Of parameters that TP and PP ranks have in common, one rank's are saved.
        assert rank[name]["as saved"] or name in ("TP2", "PP2xVPP2")


def test_megatron_itself_reads_the_same() -> None:
    assert all(rank["DP2"]["as Megatron loads"] for rank in two_ranks(__name__))


def test_a_save_in_the_background_writes_the_same() -> None:
    assert two_ranks(__name__)[0]["DP2"]["in the background"] == []


def test_what_earlier_versions_saved_is_loaded_to_the_last_bit() -> None:
    assert all(rank["as before"] for rank in two_ranks(__name__))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_is_the_same_whichever_layout_has_read_and_saved_it(name: str) -> None:
    """Each has read what the one before has saved, the first what an earlier version has, and DP2 is the last again."""
    assert two_ranks(__name__)[0]["same"][name] == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_writes_its_share(name: str) -> None:
    """Half of everything; what both ranks have is written once."""
    ranks = [rank[name] for rank in two_ranks(__name__)]
    total = sum(rank["written"] for rank in ranks)
    # The last of two pipeline stages has a copy of the tied embeddings, which the first one writes.
    assert all(0.39 * total < rank["written"] <= rank["owned"] for rank in ranks)


def test_ranks_plan_anew_only_if_pieces_have_moved_on_one_of_them() -> None:
    for rank in two_ranks(__name__):
        assert rank["DP2"]["as planned anew"] == [(1, []), (1, []), (2, []), (2, [])]


def test_a_plan_knows_what_ranks_write() -> None:
    ranks = [rank["DP2"] for rank in two_ranks(__name__)]
    assert sum(rank["planned"] for rank in ranks) == sum(rank["written"] for rank in ranks)
    # The ranks' shares of the weights differ by at most the largest one.
    assert all(abs(rank["planned"] - rank["written"]) <= 4 * 32 * VOCAB_SIZE for rank in ranks)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_save_takes_no_more_memory_than_a_rank_owns(name: str) -> None:
    descriptions = 256 << 10  # of tensors, which ranks send each other; a gathered optimizer takes 1.7 MB here
    for rank in two_ranks(__name__):
        assert all(0 < peak <= rank[name]["owned"] + descriptions for peak in rank[name]["peaks"])


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_boxes_hold_every_range_of_a_flattened_tensor_in_order(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).view(shape)
    for start in range(tensor.numel() + 1):
        for end in range(start, tensor.numel() + 1):
            boxes = list(sharded_state.boxes_of_range(shape, start, end))
            assert len(boxes) <= 2 * len(shape) - 1
            parts = [tensor[tuple(map(slice, offsets, map(operator.add, offsets, sizes)))] for offsets, sizes in boxes]
            assert [number for part in parts for number in part.flatten().tolist()] == list(range(start, end))


def hybrid() -> HybridDeviceOptimizer:
    """Megatron's own, with everything on the CPU."""
    parameter = torch.nn.Parameter(torch.ones(4))
    adam = {"cpu_optimizer_cls": torch.optim.AdamW, "gpu_optimizer_cls": torch.optim.AdamW}
    return HybridDeviceOptimizer([parameter], **adam, overlap_cpu_optimizer_d2h_h2d=False, lr=0.1)


def test_a_hybrid_optimizers_groups_can_be_read_without_running_code(tmp_path: Path) -> None:
    groups = hybrid().state_dict()["param_groups"]
    torch.save({"optimizer": {"param_groups": groups}}, tmp_path / "as_is.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "as_is.pt", weights_only=True)
    plain = sharded_state._without_classes({"optimizer": {"param_groups": groups}, "param_state": 1})
    torch.save(plain, tmp_path / "plain.pt")
    read = torch.load(tmp_path / "plain.pt", weights_only=True)
    kept = {key for key, value in groups[0].items() if not isinstance(value, type)}
    assert read["optimizer"]["param_groups"][0].keys() == kept and read["param_state"] == 1


def test_a_group_of_another_adam_is_completed() -> None:
    class FusedAdam(torch.optim.AdamW):
        """Counts per group, and reads a key of its own from there."""

        def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
            super().__init__(parameters, lr=0.1)
            self.defaults["bias_correction"] = True

    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(1))])
    group = complete_group(optimizer, {"lr": 0.5, "step": 3.0})
    assert group["bias_correction"] is True and group["lr"] == 0.5
    assert group["step"] == 3 and isinstance(group["step"], int)
    assert "step" not in complete_group(optimizer, {"lr": 0.5})


@pytest.mark.parametrize(("fp8", "recipe", "kept"), [(None, "delayed", False), ("hybrid", "blockwise", False),
                                                     ("hybrid", "delayed", True)])  # fmt: skip
def test_scales_made_of_earlier_steps_are_saved_and_no_other_kernel_state(fp8, recipe, kept) -> None:
    layer = torch.nn.Identity()
    layer.fp8_meta = {
        side: SimpleNamespace(scale=torch.ones(size), amax_history=torch.zeros(2, size))
        for side, size in (("scaling_fwd", 3), ("scaling_bwd", 2))
    }
    module = torch.nn.ModuleDict({"linear": layer})
    module.config = SimpleNamespace(fp8=fp8, fp8_recipe=recipe)
    stored = ShardedObject("linear._extra_state", b"a pickle", (1,), (0,))
    module.sharded_state_dict = lambda metadata: {"linear.weight": 1, "linear._extra_state": stored}
    state = sharded_state._chunk_state(module, {})
    assert ("linear._extra_state" in state) is kept
    if kept:  # tensors, which a safe reader accepts
        data = state["linear._extra_state"].data
        assert data["scaling_fwd.scale"].tolist() == [1, 1, 1] and data["scaling_bwd.amax_history"].shape == (2, 2)
        assert len(data) == 4 and all(isinstance(value, torch.Tensor) for value in data.values())


def grouped_layer(place_of_weights: int) -> Any:
    """Stands for a layer that computes two experts in one kernel, whose first weight has the scale at that place."""
    layer: Any = torch.nn.Identity()
    layer._offsets = {"weight": place_of_weights}
    layer.num_gemms = 2
    layer.init_fp8_meta_tensors = lambda recipe: None
    layer.fp8_meta = {
        side: SimpleNamespace(
            scale=torch.arange(size) + first, amax_history=torch.arange(2 * size).view(2, size) + 100 + first
        )
        for side, size, first in (("scaling_fwd", 6, 0.0), ("scaling_bwd", 4, 10.0))
    }
    return layer


@pytest.mark.parametrize(("place_of_weights", "forward", "backward"), [(1, [3, 4, 5], [2, 3]), (2, [1, 3, 5], [1, 3])])
def test_experts_in_one_kernel_have_scales_of_their_own(place_of_weights, forward, backward) -> None:
    """So another number of ranks can share them. Megatron names their states `_extra_state`, `_extra_state1`, ..."""
    module = torch.nn.ModuleDict({"experts": grouped_layer(place_of_weights)})
    names = ["experts._extra_state", "experts._extra_state1"]
    states = {
        name: ShardedObject("experts._extra_state", b"a pickle", (2,), (n,), replica_id=(0, 0, 0))
        for n, name in enumerate(names)
    }
    module.sharded_state_dict = lambda metadata: {"experts.weight0": 1, **states}
    module.config = SimpleNamespace(fp8=None)
    assert sharded_state._chunk_state(module, {}).keys() == {"experts.weight0"}
    module.config = SimpleNamespace(fp8="hybrid", fp8_recipe="delayed")
    state = sharded_state._chunk_state(module, {})
    second = state[names[1]].data
    assert second["scaling_fwd.scale"].tolist() == forward
    assert second["scaling_bwd.scale"].tolist() == [10 + place for place in backward]
    assert second["scaling_fwd.amax_history"].tolist() == [[first + n for n in forward] for first in (100, 106)]
    target = torch.nn.ModuleDict({"experts": grouped_layer(place_of_weights)})
    target.config = module.config
    for meta in target["experts"].fp8_meta.values():
        meta.scale.zero_(), meta.amax_history.zero_()
    loaded = {name: value.data if name in names else value for name, value in state.items()}
    with mock.patch.object(megatron_internals, "get_fp8_recipe", lambda config: None):
        sharded_state.load_kernel_state(target, loaded)
    assert loaded.keys() == {"experts.weight0"}
    for side in ("scaling_fwd", "scaling_bwd"):
        for name in ("scale", "amax_history"):
            found, wanted = (getattr(each["experts"].fp8_meta[side], name) for each in (target, module))
            assert torch.equal(found, wanted)

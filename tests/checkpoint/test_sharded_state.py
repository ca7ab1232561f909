"""The sharded state of model and optimizer: each rank's share of it, and states of one Adam in another one."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_solopo.checkpoint import sharded_state
from megatron_solopo.checkpoint.load import load_checkpoint
from megatron_solopo.checkpoint.save import ShardedSave
from megatron_solopo.checkpoint.sharded_state import (
    complete_group,
    load_optimizer_state,
    optimizer_state_to_load,
    without_classes,
)
from megatron_solopo.config import parse_config
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel.megatron_internals import initialize_adam_state
from megatron_solopo.train.policy import Policy, build_policy
from tests.ranks import layout, two_ranks
from tests.tiny_models import make_model

LAYOUTS: dict[str, dict[str, int]] = {
    "DP2": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2xVPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}


def on_two_ranks() -> dict[str, Any]:
    """By layout: how much this rank asked for, and whether it got what was saved, and what Megatron's own way gets."""
    return {name: saved_and_loaded(sizes) for name, sizes in LAYOUTS.items()}


def saved_and_loaded(sizes: dict[str, int]) -> dict[str, Any]:
    with layout(**sizes) as groups:
        told: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(told, src=0)
        folder = Path(told[0])
        if dist.get_rank() == 0:
            make_model(folder / "model", "qwen2_tied")
        dist.barrier()
        section = {"model": {"path": folder / "model"}, "data": {"path": "unused", "max_tokens_per_pack": 100}}
        config = parse_config(
            {"run_dir": "unused", "training": {"global_batch_size": 1}, "parallel": sizes} | section, source="test"
        )
        model = resolve_model(config.model, config.parallel)
        saved, ours, theirs = (build_policy(config, model, groups, max_steps=10) for _ in range(3))
        wanted = invent(saved)
        path = ShardedSave(folder, saved.chunks, saved.optimizer, {"step": 1}, {}).complete()
        load_checkpoint(path, ours.chunks, ours.optimizer)
        load_as_megatron_does(path, theirs)
        model = sharded_state.model_state(ours.chunks)
        asked = optimizer_state_to_load(ours.optimizer, model)["param_state"]
        sizes_of = {number: place["param"].data.numel() for number, place in asked.items()}
        return {
            "as saved": same(held(ours), wanted),
            "as Megatron loads": same(held(ours), held(theirs)),
            "asked": sizes_of,
            "all": [parameter.numel() for buffer in inner(ours).buffers for parameter in buffer.param_index_map],
        }


def inner(policy: Policy) -> Any:
    (optimizer,) = policy.optimizer.chained_optimizers
    return optimizer


def invent(policy: Policy) -> list[torch.Tensor]:
    """Give a policy a state that no other rank has; returns a copy of it."""
    initialize_adam_state(policy.optimizer)
    torch.manual_seed(dist.get_rank())
    for tensor in held(policy):
        tensor.normal_()
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
    load_optimizer_state(policy.optimizer, dist_checkpointing.load({"optimizer": wanted}, str(path))["optimizer"])


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) > 0 and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_gets_its_share_to_the_last_bit(name: str) -> None:
    for rank in two_ranks(__name__):
        assert rank[name]["as Megatron loads"]
        # Of parameters that TP and PP ranks have in common, one rank's are saved.
        assert rank[name]["as saved"] or name != "DP2"


def test_ranks_that_share_parameters_ask_for_parts_of_them() -> None:
    ranks = [rank["DP2"] for rank in two_ranks(__name__)]
    assert set(ranks[0]["asked"]) | set(ranks[1]["asked"]) == set(range(len(ranks[0]["all"])))
    assert len(set(ranks[0]["asked"]) & set(ranks[1]["asked"])) <= 1  # the one that the middle of the buffer cuts
    for rank in ranks:
        assert sum(rank["asked"].values()) < 0.8 * sum(rank["all"])


@pytest.mark.parametrize("name", ["TP2", "PP2xVPP2"])
def test_a_rank_without_others_asks_for_all_that_it_holds(name: str) -> None:
    for rank in two_ranks(__name__):
        assert list(rank[name]["asked"].values()) == rank[name]["all"]


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
    torch.save(without_classes({"optimizer": {"param_groups": groups}, "param_state": 1}), tmp_path / "plain.pt")
    read = torch.load(tmp_path / "plain.pt", weights_only=True)
    kept = {key for key, value in groups[0].items() if not isinstance(value, type)}
    assert read["optimizer"]["param_groups"][0].keys() == kept and read["param_state"] == 1


def test_a_hybrid_optimizer_counts_on_after_it_was_loaded() -> None:
    """Its groups override those inside before every step: a `step` left there would stand still."""
    optimizer = hybrid()
    loaded = mock.Mock(spec=DistributedOptimizer, optimizer=optimizer)
    loaded.load_state_dict.side_effect = lambda state: optimizer.param_groups[0].update(step=7)
    load_optimizer_state(loaded, {"param_state": {}, "optimizer": {"param_groups": [{"lr": 0.1}]}})
    assert all("step" not in group for group in optimizer.param_groups)


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
    module = SimpleNamespace(
        config=SimpleNamespace(fp8=fp8, fp8_recipe=recipe),
        sharded_state_dict=lambda metadata: {"linear.weight": 1, "linear._extra_state": 2},
    )
    assert ("linear._extra_state" in sharded_state._chunk_state(module, {})) is kept

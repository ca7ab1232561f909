"""What a data-parallel rank asks for of a checkpoint's optimizer state, beside Megatron's own way of loading it."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_solopo.checkpoint import load as distributed
from megatron_solopo.checkpoint.load import begin_save, load_checkpoint
from megatron_solopo.checkpoint.optimizer_state import load_state, requested_share
from megatron_solopo.checkpoint.save import CheckpointContent
from megatron_solopo.config import parse_config
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
        saved, ours, theirs = (build_policy(config, groups, max_steps=10) for _ in range(3))
        wanted = invent(saved)
        path = begin_save(folder, saved.chunks, saved.optimizer, CheckpointContent({"step": 1}, {})).complete()
        load_checkpoint(path, ours.chunks, ours.optimizer)
        load_as_megatron_does(path, theirs)
        model = distributed._parameters(distributed._sharded_model_state(ours.chunks))
        asked = requested_share(inner(ours), model)
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
    model = distributed._parameters(distributed._sharded_model_state(policy.chunks))
    wanted = policy.optimizer.sharded_state_dict(model, is_loading=True, metadata=distributed._metadata())
    load_state(policy.optimizer, dist_checkpointing.load({"optimizer": wanted}, str(path))["optimizer"])


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

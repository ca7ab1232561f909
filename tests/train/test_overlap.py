"""Overlapped communication and copies of the optimizer's state against the plain path: same losses and gradients.

Two ranks that add two numbers cannot add them in another order. So losses, gradients and updates are bit-equal there.
Four ranks add in the order of their ring, which depends on a bucket's size, and copies of the optimizer add in pairs.
The gradient's norm is a sum over a rank's share, and other buckets make other shares.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.checkpoint.load import global_parameters
from megatron_solopo.config import Config
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.megatron_internals import gradient_buffers
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train import policy as policy_module
from megatron_solopo.train.policy import Policy, build_policy
from megatron_solopo.train.step import objective_loss, run_schedule
from megatron_solopo.train.trainer import train as train_whole
from tests.distributed import run_distributed
from tests.layouts import cp, pp, tp
from tests.parity.layouts import Layout, Plan, make_config, my_packs
from tests.parity.test_parity import make_rows
from tests.tiny_models import make_model
from tests.train.runs import make_inputs, recorded, small_config

ORPO = {"name": "solopo", "loss_type": "orpo", "beta": 0.1}
STEPS = 3
NORM_TOLERANCE = 1e-6
BUCKET_SIZE = 2000  # parameters; the tiny models have several such buckets
ONE_REPLICA: Plan = [[[0], [1], [2], [3]]]
TWO_REPLICAS: Plan = [[[0], [2]], [[1], [3]]]
FOUR_REPLICAS: Plan = [[[0]], [[1]], [[2]], [[3]]]
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
REDUCE = {"overlap_grad_reduce": True, "overlap_param_gather": False}
TWO_INSTANCES = {"num_distributed_optimizer_instances": 2}
HIERARCHICAL = {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [2, 2]}
BFLOAT16 = {"dtype": "bfloat16"}
BATCHES = [make_rows(4, seed) for seed in range(STEPS)]


@dataclass(frozen=True)
class Pair:
    """A layout, and what is compared with its plain path."""

    name: str
    plan: Plan
    changed: dict[str, Any]
    parallel: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    family: str = "llama3"
    tolerance: float = 0.0
    """Relative, in the Euclidean norm of a tensor; 0: all bits are equal."""


@dataclass
class Found:
    """What one rank saw."""

    reports: list[Tensor] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Reduced, of the last step."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    early_reductions: list[int] = field(default_factory=list)
    """Per step: bucket groups whose reduction had begun when backward ended."""
    groups: int = 0


PAIRS = {
    2: [
        Pair("dp2", TWO_REPLICAS, OVERLAP),
        Pair("dp2-reduce-alone", TWO_REPLICAS, REDUCE),
        Pair("dp2-tied-recompute", TWO_REPLICAS, OVERLAP, {"recompute_granularity": "full"}, family="qwen2_tied"),
        Pair("dp2-whole-optimizer", TWO_REPLICAS, REDUCE, optimizer={"use_distributed_optimizer": False}),
        Pair("dp2-bf16-gradients", TWO_REPLICAS, OVERLAP, optimizer={"grad_reduce_in_fp32": False}, model=BFLOAT16),
        Pair("cp2", ONE_REPLICA, OVERLAP, cp(2)),
    ],
    4: [
        Pair("dp2-pp2-tied", TWO_REPLICAS, OVERLAP, pp(2), family="qwen2_tied"),
        Pair("dp2-pp2-vpp2", TWO_REPLICAS, OVERLAP, pp(2, 2)),
        Pair("dp2-tp2", TWO_REPLICAS, OVERLAP, tp(2)),
    ],
}
# Megatron-Core needs the package einops for these.
NESTED = {
    2: [Pair("dp2-two-instances", TWO_REPLICAS, TWO_INSTANCES)],
    4: [
        # On a CPU, attention gathers keys and values in any case; the groups of this exchange exist nevertheless.
        Pair("cp4-a2a+p2p", ONE_REPLICA, HIERARCHICAL, cp(4)),
        Pair("dp4-two-instances", FOUR_REPLICAS, TWO_INSTANCES, tolerance=1e-5),
        Pair("dp2-cp2-two-instances", TWO_REPLICAS, TWO_INSTANCES | OVERLAP, cp(2), tolerance=1e-5),
    ],
}
if find_spec("einops"):
    PAIRS = {size: pairs + NESTED[size] for size, pairs in PAIRS.items()}


def run_pairs(models: Path, pairs: Sequence[Pair]) -> dict[str, tuple[Found, Found]]:
    """Runs on every rank."""
    return {pair.name: (run(models, pair, {}), run(models, pair, pair.changed)) for pair in pairs}


def run(models: Path, pair: Pair, changed: dict[str, Any]) -> Found:
    layout = Layout(
        pair.name,
        pair.plan,
        pair.parallel | {"overlap_grad_reduce": False} | changed,
        distributed_optimizer=True,
        model=pair.model,
        optimizer=pair.optimizer,
    )
    config = make_config(models / pair.family, ORPO, layout)
    groups = topology.initialize(config.parallel, seed=1)
    try:
        with small_buckets():
            policy = build_policy(config, resolve_model(config.model, config.parallel), groups, max_steps=STEPS)
        return train(config, layout, groups, policy)
    finally:
        topology.destroy(groups)


@contextmanager
def small_buckets() -> Iterator[None]:
    make = policy_module.data_parallel_config

    def with_bucket_size(*arguments: Any, **keywords: Any) -> Any:
        found = make(*arguments, **keywords)
        found.bucket_size = BUCKET_SIZE
        return found

    with mock.patch.object(policy_module, "data_parallel_config", with_bucket_size):
        yield


def train(config: Config, layout: Layout, groups: Topology, policy: Policy) -> Found:
    loss = objective_loss(config.objective, None, groups)
    bucket_groups = [group for chunk in policy.chunks for group in chunk.bucket_groups]
    found = Found(groups=len(bucket_groups))
    finalize = policy.chunks[0].config.finalize_model_grads_func

    def count_and_finalize(*arguments: Any, **keywords: Any) -> None:
        found.early_reductions.append(sum(group.grad_reduce_handle is not None for group in bucket_groups))
        finalize(*arguments, **keywords)

    policy.chunks[0].config.finalize_model_grads_func = count_and_finalize
    for number, batch in enumerate(BATCHES):
        packs = my_packs(batch, number, layout, config.objective.roles.all, groups)
        result = policy.step(packs, loss, groups)
        assert result.gradient_was_finite and not result.skipped
        found.reports += result.reports
        found.norms.append(result.grad_norm)
        if number == 1:  # between two steps
            with torch.no_grad():
                found.reports += run_schedule(policy.chunks, packs, loss, groups, forward_only=True)
    gather_gradients(policy)
    policy.gather_parameters()
    for chunk in policy.chunks:
        for name, parameter in global_parameters(chunk.module):
            found.gradients[name] = parameter.main_grad.float()
            found.parameters[name] = parameter.detach().float().clone()
    return found


def gather_gradients(policy: Policy) -> None:
    """Complete `main_grad`, of which the distributed optimizer leaves a rank its own share."""
    for chunk in policy.chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        group = chunk.intra_dp_cp_group
        for bucket in (bucket for buffer in gradient_buffers(chunk) for bucket in buffer.buckets):
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather(list(bucket.grad_data.chunk(group.size())), own, group=group)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama3", "qwen2_tied"):
        make_model(folder / family, family, seed=0)
    return folder


@pytest.fixture(scope="module", params=list(PAIRS))
def launched(request: pytest.FixtureRequest, models: Path) -> tuple[int, list[dict[str, tuple[Found, Found]]]]:
    return request.param, run_distributed(run_pairs, request.param, models, PAIRS[request.param])


def test_loss_gradients_and_update_are_those_of_the_plain_path(launched) -> None:
    size, ranks = launched
    for pair in PAIRS[size]:
        for rank, results in enumerate(ranks):
            plain, changed = results[pair.name]
            where = f"{pair.name}, rank {rank}"
            same(plain.reports, changed.reports, pair.tolerance, f"{where}: loss")
            assert changed.norms == pytest.approx(plain.norms, rel=NORM_TOLERANCE), where
            for kind in ("gradients", "parameters"):
                before, after = getattr(plain, kind), getattr(changed, kind)
                assert before.keys() == after.keys() and before
                for name, value in before.items():
                    same([value], [after[name]], pair.tolerance, f"{where}: {kind} of {name}")


def same(plain: Sequence[Tensor], changed: Sequence[Tensor], tolerance: float, where: str) -> None:
    assert len(plain) == len(changed)
    for one, other in zip(plain, changed, strict=True):
        if tolerance == 0:
            assert torch.equal(one, other), where
        else:
            assert (one - other).norm() <= tolerance * one.norm(), where


def test_reductions_begin_within_backward(launched) -> None:
    """Megatron learns in the first step which gradients come, so overlap begins with the second."""
    size, ranks = launched
    for pair in PAIRS[size]:
        for results in ranks:
            plain, changed = results[pair.name]
            assert plain.early_reductions == [0] * STEPS, pair.name
            instances = pair.changed.get("num_distributed_optimizer_instances", 1)
            if instances == 1 and pair.changed.get(
                "overlap_grad_reduce"
            ):  # with several, they run on a stream of their own, without a handle
                assert changed.early_reductions == [0, changed.groups, changed.groups], pair.name
                assert changed.groups >= plain.groups
    assert size == 4 or any(changed.groups > 1 for results in ranks for _, changed in results.values())


# Runs of four steps, with a save after each: what they change, and the run and the step that they continue from.
RUNS: dict[str, tuple[dict[str, Any], tuple[str, int] | None]] = {"plain": ({}, None), "overlap": (OVERLAP, None)}
if find_spec("einops"):
    RUNS["instances-after-overlap"] = (TWO_INSTANCES, ("overlap", 2))
    RUNS["plain-after-instances"] = ({}, ("instances-after-overlap", 3))
else:
    RUNS["plain-after-overlap"] = ({}, ("overlap", 2))


def run_whole(folder: Path) -> None:
    """On both ranks. The norm is a sum over shares, so clipping by it would change the last bits of the update."""
    for name, (parallel, source) in RUNS.items():
        if source is not None and dist.get_rank() == 0:
            continue_from(folder / source[0], source[1], folder / name)
        dist.barrier()
        config = small_config(
            folder,
            name,
            {"overlap_grad_reduce": False} | parallel,
            objective=ORPO,
            optimizer={"lr": 1e-3, "lr_warmup_iters": 1, "adam_eps": 1e-2, "clip_grad": 0.0},
            checkpoint={"save_steps": 1},
        )
        with small_buckets():
            train_whole(config)


def continue_from(source: Path, step: int, target: Path) -> None:
    """A copy of a run as it was after the save of a step."""
    shutil.copytree(source, target)
    for later in range(step + 1, 5):
        shutil.rmtree(target / "checkpoints" / f"iter_{later:07d}")


def test_a_save_and_an_evaluation_before_the_gather_see_whole_parameters(tmp_path: Path) -> None:
    """Steps, evaluations and continued runs of the plain path and the overlapped one have the same bits."""
    folder = make_inputs(tmp_path)
    run_distributed(run_whole, 2, folder)

    def seen(name: str) -> list[dict[str, Any]]:
        return [{key: value for key, value in step.items() if key != "grad_norm"} for step in recorded(folder, name)]

    wanted = seen("plain")
    assert [step["step"] for step in wanted] == [1, 2, 3, 4] and "eval_loss" in wanted[-1]
    for name in RUNS:
        assert seen(name) == wanted, name

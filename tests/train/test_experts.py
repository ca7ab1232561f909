"""Whole runs of a mixture of experts on two ranks: its checkpoints continue under every layout of its experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (imported once, before ranks are forked)

from megatron_solopo.checkpoint.conversion import export_model
from megatron_solopo.config import Config
from megatron_solopo.errors import UserError
from megatron_solopo.train.trainer import train
from tests.distributed import run_distributed
from tests.layouts import cp, ep, pp, tp
from tests.parity import plain
from tests.prepared import make_prepared
from tests.tiny_models import ROUTER, make_model
from tests.train.runs import leave_interrupted, recorded, small_config

pytestmark = pytest.mark.parity

SAVED = 2
TRAINED = {"moe": {"router_trainable": True}}
# With the usual epsilon, Adam would make noise of what is zero but for rounding, and routers make much of noise.
ADAM = {"lr": 1e-2, "lr_warmup_iters": 1, "adam_eps": 1e-2}
WITHOUT_SHARES = {"optimizer": ADAM | {"use_distributed_optimizer": False}}
BFLOAT16 = {"model": "bfloat16"}
REPLAYED = {"moe": {"replay": "short"}}
WITHIN_TP = ep(2, **tp(2), expert_tensor_parallel_size=1)
# The runs that write checkpoints: layout, other sections.
WHOLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ep2": (ep(2), TRAINED),
    "dp2": ({}, TRAINED),
    "cp2-ep2-within": (ep(2, **cp(2)), {}),
    "without-shares": (ep(2), WITHOUT_SHARES),
    "bfloat16": (ep(2), BFLOAT16),
}
# The runs that continue one of them from its middle, under another layout or the same.
CONTINUED: list[tuple[str, dict[str, Any]]] = [
    ("ep2", ep(2)),
    ("ep2", {}),
    ("ep2", tp(2)),
    ("ep2", pp(2)),
    ("dp2", WITHIN_TP),
    ("cp2-ep2-within", ep(2)),
    ("without-shares", {}),
    ("bfloat16", tp(2)),
    ("bfloat16", ep(2)),
]


def config(folder: Path, name: str, parallel: dict[str, Any], sections: dict[str, Any]) -> Config:
    """Run `name` of four steps, with a checkpoint in the middle."""
    more = {"checkpoint": {"save_steps": SAVED}, "optimizer": ADAM, **sections}
    # Another reference than the policy, whose rewards are 0 but for rounding: the sign of their gap would be noise.
    more.setdefault(
        "reference",
        {
            "model_path": folder / "reference_model",
            "cache": folder / f"reference-{more.get('model', 'float32')}",
        },
    )
    if "model" in more:
        more["model"] = {"path": folder / "model", "dtype": more["model"]}
    return small_config(folder, name, parallel, **more)


def run_on_two(folder: Path) -> list[str]:
    """On every rank: the whole runs, and their continuations; returns why a run does not freeze its routers later.

    Then a run with replayed routes, and why neither another run takes its reference nor the run itself goes on without.
    """
    for name, (parallel, sections) in WHOLE.items():
        train(config(folder, name, parallel, sections))
    for number, (name, parallel) in enumerate(CONTINUED):
        continue_from_middle(folder, name, f"continued-{number}", parallel)
    train(config(folder, "replayed", ep(2), {"reference": replayed_reference(folder), **REPLAYED}))
    return [
        refusal(config(folder, "ep2", ep(2), {})),
        refusal(config(folder, "not-replayed", ep(2), {"reference": replayed_reference(folder)})),
        refusal(config(folder, "replayed", ep(2), {"reference": replayed_reference(folder)})),
    ]


def replayed_reference(folder: Path) -> dict[str, Any]:
    """The policy's own weights, whose rewards are 0 where both replay the same routes."""
    return {"model_path": folder / "model", "cache": folder / "reference-replayed"}


def refusal(settings: Config) -> str:
    with pytest.raises(UserError) as error:
        train(settings)
    return str(error.value)


def run_on_four(folder: Path) -> None:
    """On every rank. Two ranks have the same experts, and share the work of writing them."""
    train(config(folder, "four", *WHOLE["ep2"]))
    continue_from_middle(folder, "four", "continued-four", ep(4))


def continue_from_middle(folder: Path, name: str, target: str, parallel: dict[str, Any]) -> None:
    """Continue what `name` would have left, had it died after its first checkpoint."""
    leave_interrupted(folder, name, target, SAVED)
    train(config(folder, target, parallel, WHOLE.get(name, WHOLE["ep2"])[1]))


def reshard_on_two(folder: Path) -> None:
    """On every rank: a run with shares of each weight, one without, and each continued as the other."""
    for name, parallel, other in (("tp2", tp(2), {}), ("dp2", {}, tp(2))):
        train(config(folder, name, parallel, TRAINED))
        continue_from_middle(folder, name, f"continued-{name}", other)


def prepared(path: Path, family: str) -> Path:
    """A folder with two models and triplets."""
    make_model(path / "model", family, seed=0)
    make_model(path / "reference_model", family, seed=1)
    make_prepared(path / "prepared", rows=15, eval_count=5, seed=0)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("experts"), "qwen2_moe")


@pytest.fixture(scope="module")
def refusals(folder: Path) -> list[str]:
    found: list[str] = run_distributed(run_on_two, 2, folder)[0]
    return found


@pytest.mark.parametrize("number", range(len(CONTINUED)))
@pytest.mark.usefixtures("refusals")
def test_a_run_continues_under_another_layout_of_its_experts(number: int, folder: Path) -> None:
    name, parallel = CONTINUED[number]
    whole, continued = recorded(folder, name), recorded(folder, f"continued-{number}")
    if WHOLE[name][0] == parallel:
        assert continued == whole, "bit by bit"
        return
    if name == "bfloat16":
        assert_near(continued, whole, recorded(folder, "cp2-ep2-within"))
    else:
        assert_close(continued, whole, 1e-5)


def test_norms_of_all_heads_are_cut_and_joined(tmp_path: Path) -> None:
    """Tensor parallelism cuts OLMoE's norms of queries and keys; Megatron-Core's other norms are whole everywhere."""
    run_distributed(reshard_on_two, 2, prepared(tmp_path, "olmoe"))
    for name in ("tp2", "continued-tp2", "continued-dp2"):
        assert_close(recorded(tmp_path, name), recorded(tmp_path, "dp2"), 1e-5)


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=tolerance)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * tolerance)


def assert_near(found: list[dict[str, Any]], rounded: list[dict[str, Any]], exact: list[dict[str, Any]]) -> None:
    """Two bfloat16 runs of the same float32 run differ by twice what one of them differs from that run."""
    for name in ("loss", "grad_norm"):
        rounding = greatest_difference(name, rounded, exact)
        print(f"{name}: rounding {rounding:.1e}, continued {greatest_difference(name, found, rounded):.1e}")
        # 4 layers round about 24 times each, by 2^-8 at most, without a common direction (tests/parity/test_bfloat16).
        assert 0 < rounding < 2**-8 * (4 * 24) ** 0.5
        assert 0 < greatest_difference(name, found, rounded) < 2 * rounding


def greatest_difference(name: str, found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """Relative, of the steps of two runs."""
    assert len(found) == len(expected) == 4
    pairs = zip(found, expected, strict=True)
    return max(abs(float(one[name]) / float(other[name]) - 1) for one, other in pairs)


@pytest.mark.usefixtures("refusals")
def test_sharing_experts_changes_nothing(folder: Path) -> None:
    assert_close(recorded(folder, "ep2"), recorded(folder, "dp2"), 1e-5)
    run_distributed(run_on_four, 4, folder)
    for name in ("four", "continued-four"):
        assert_close(recorded(folder, name), recorded(folder, "dp2"), 1e-5)


def test_a_run_does_not_begin_to_freeze_its_routers(refusals: list[str]) -> None:
    assert "moe.router_trainable=false (it was true)" in refusals[0]


def test_policy_and_reference_replay_the_same_routes(refusals: list[str], folder: Path) -> None:
    steps = recorded(folder, "replayed")
    assert [step["moe/route_agreement"] for step in steps] == [1.0] * 4
    assert recorded(folder, "ep2")[0]["moe/route_agreement"] < 0.9
    for name in ("rewards/chosen", "rewards/chosen_long", "solo_ra/gap_abs"):
        assert steps[0][name] == pytest.approx(0, abs=1e-5), name
    assert "replay (short; this run has moe.replay=null)" in refusals[1]
    assert "moe.replay=null (it was short)" in refusals[2]


@pytest.mark.usefixtures("refusals")
def test_routers_are_trained_only_where_asked(folder: Path, tmp_path: Path) -> None:
    before = plain.parameters(folder / "model")
    routers = {key for key in before if key.endswith(ROUTER)}
    for name, learn in (("ep2", True), ("cp2-ep2-within", False)):
        export_model(folder / name / "checkpoints" / "iter_0000004", tmp_path / name, dtype=None, verification="full")
        after = plain.parameters(tmp_path / name)
        changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
        assert len(changed - routers) > 10 and routers & changed == (routers if learn else set())

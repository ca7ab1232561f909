"""Plans of mixtures of experts: sizes of published models, shares of the ranks."""

import pytest

from megatron_solopo.plan.memory import rank_state
from tests.plan.models import load_example


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [("qwen3-30b-a3b", 30_532_122_624, 3_353_032_704), ("qwen3-235b-a22b", 235_093_634_560, 22_190_763_520)],
)
def test_published_models_have_as_many_parameters_as_published(model: str, total: int, active: int) -> None:
    architecture = load_example(model)[1]
    assert architecture.num_parameters == total
    assert architecture.num_active_parameters == active


def test_ranks_divide_the_experts_and_their_state() -> None:
    """EP 8 within 32 ranks: an eighth of the experts, of whose state four ranks hold a quarter each."""
    config, architecture = load_example("qwen3-30b-a3b", "parallel.expert_model_parallel_size=8")
    experts = architecture.experts
    assert experts is not None
    expert_weights = 48 * 128 * 3 * 2048 * 768
    others = architecture.num_parameters - expert_weights
    state = rank_state(architecture, config, 0, 32)
    assert state.expert_parameters == 2 * expert_weights / 8
    assert state.parameters == pytest.approx(2 * (expert_weights / 8 + others), rel=1e-4)
    trained = others - architecture.num_router_parameters
    assert state.gradients == pytest.approx(4 * (expert_weights / 8 + trained), rel=1e-4)
    assert state.optimizer == pytest.approx(12 * (expert_weights / 8 / 4 + trained / 32), rel=1e-3)

"""bfloat16 gradients against float32 ones of the same (bfloat16) weights, within a bound that comes from the format.

A bfloat16 number has 8 significant bits, so one rounding moves it by at most 2^-8 of itself. A layer rounds about
twelve times on its way forward and as often backward: two norms, queries with keys and values, rotation, attention,
its projection, three steps of the gated MLP and its product, two residual sums. Rounding errors have no common
direction, so n of them add up to 2^-8 sqrt(n) rather than to 2^-8 n.
"""

import functools
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_solopo.architecture.huggingface_config import read_architecture
from tests.gpu.models import make_model
from tests.gpu.test_training import batches, gradient_error, losses
from tests.parity.layouts import UNPACKED, Case, Layout, RankResult, run_case

pytestmark = pytest.mark.parity

DPO = {"name": "solopo", "loss_type": "dpo", "beta": 0.1, "align": "both", "distance": "l2"}
ROUNDING = 2**-8
ROUNDINGS_PER_LAYER = 2 * 12
FAMILIES = ("llama3", "qwen2_tied", "qwen3")


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def run(family: str, dtype: str, grad_reduce_in_fp32: bool = True) -> tuple[RankResult, Path]:
        path = folder / family
        if not path.exists():
            for seed, name in enumerate(("policy", "reference")):
                make_model(path / name, family, seed)
        layout = Layout("one", UNPACKED, model={"dtype": dtype}, optimizer={"grad_reduce_in_fp32": grad_reduce_in_fp32})
        return run_case(path, Case(family, DPO, layout), batches()[:1]), path / "policy"

    return run


def bound(path: Path, accumulations: int = 0) -> float:
    """Relative size of the error of a whole gradient.

    Args:
        accumulations: packs whose gradients are added up in bfloat16.
    """
    roundings = ROUNDINGS_PER_LAYER * read_architecture(path).num_layers + accumulations
    return ROUNDING * math.sqrt(roundings)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_gradients_are_float32_ones_to_rounding(family: str, train: Any) -> None:
    (exact, path), (rounded, _) = train(family, "float32"), train(family, "bfloat16")
    error = gradient_error(rounded, exact)
    print(f"{family}: gradient error {error:.4f}, bound {bound(path):.4f}")
    assert 0 < error < bound(path)
    assert float((losses(rounded) - losses(exact)).abs() / losses(exact)) < bound(path)


def test_gradients_that_are_added_up_in_bfloat16_stay_within_the_bound(train: Any) -> None:
    (exact, path), (rounded, _) = train("llama3", "float32"), train("llama3", "bfloat16", False)
    (in_fp32, _) = train("llama3", "bfloat16")
    error = gradient_error(rounded, exact)
    print(f"gradient error {error:.4f} ({gradient_error(in_fp32, exact):.4f} if added up in float32)")
    # The first pack is added to zero, which rounds nothing.
    assert gradient_error(in_fp32, exact) < error < bound(path, accumulations=len(UNPACKED[0]) - 1)
    assert gradient_error(rounded, in_fp32) < ROUNDING * math.sqrt(len(UNPACKED[0]))

"""Adapters beside Transformer Engine's layers, whose norms lie within them, against those beside plain layers."""

import math
from pathlib import Path

import pytest
import torch

from megatron_solopo.config import LoRAConfig
from tests.distributed import run_distributed
from tests.emulated_gpu.test_ranks import BLOCKWISE, FP32, difference, losses, run_on_ranks
from tests.gpu.models import make_model
from tests.gpu.test_training import DPO, EXACT
from tests.layouts import tp
from tests.parity.layouts import PACKED, Case, Layout, RankResult, huggingface_tensors
from tests.tiny_models import make_adapter

FAMILY = "llama3"
LORA = {"rank": 4, "alpha": 8.0}
LAYOUTS = [
    Layout("plain", PACKED, tp(2), model=EXACT, lora=LORA),
    Layout("fp32", PACKED, tp(2), model=FP32, lora=LORA),
    Layout("fp8", PACKED, tp(2), model=BLOCKWISE, pack_multiple=256, lora=LORA),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / FAMILY
    for seed, name in enumerate(("policy", "reference")):
        make_model(folder / name, FAMILY, seed)
    make_adapter(folder / "policy", LoRAConfig(**LORA))
    return folder


@pytest.fixture(scope="module")
def results(models: Path) -> dict[str, list[RankResult]]:
    cases = [Case(FAMILY, DPO, layout) for layout in LAYOUTS]
    ranks = run_distributed(run_on_ranks, 2, models.parent, cases)
    return {case.layout.name: [rank[case.layout.name] for rank, _ in ranks] for case in cases}


def test_adapters_are_exact_in_float32(results: dict[str, list[RankResult]], models: Path) -> None:
    found, wanted = (
        huggingface_tensors([rank.gradients for rank in results[name]], models / "policy", LoRAConfig(**LORA))
        for name in ("fp32", "plain")
    )
    assert wanted and all(".lora_" in name for name in wanted), "the base learns nothing"
    assert difference(found, wanted) < 2e-5
    torch.testing.assert_close(losses(results["fp32"]), losses(results["plain"]), rtol=1e-4, atol=0)


def test_a_base_in_fp8_trains_adapters(results: dict[str, list[RankResult]]) -> None:
    assert all(math.isfinite(norm) and norm > 0 for rank in results["fp8"] for norm in rank.grad_norms)
    torch.testing.assert_close(losses(results["fp8"]), losses(results["plain"]), rtol=0.2, atol=0)

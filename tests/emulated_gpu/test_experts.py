"""Mixtures of experts in Transformer Engine's grouped products: against plain layers, over ranks, in FP8, and saved.

In float32 the grouped products agree with plain layers but for the order of sums. In bfloat16 a token near the border
between two experts may go elsewhere, so its error is compared with that of plain layers in bfloat16.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_solopo.checkpoint.load import load_checkpoint
from megatron_solopo.model import resolve
from megatron_solopo.parallel.megatron_internals import delayed_scales
from megatron_solopo.train.policy import Policy, build_policy
from megatron_solopo.train.step import ReferenceLogprobs, objective_loss
from tests.checkpoint.test_sharded_state import read_whole, save
from tests.distributed import run_distributed
from tests.emulated_gpu.extension import calls
from tests.emulated_gpu.test_ranks import BLOCKWISE, FP32, difference, losses
from tests.gpu.models import make_model
from tests.gpu.test_training import DPO, EXACT, FP8, PLAIN, TE, batches_of
from tests.layouts import ep, tp
from tests.parity.layouts import (
    PACKED,
    TWO_RANKS,
    Case,
    Layout,
    RankResult,
    huggingface_tensors,
    make_config,
    my_packs,
    run_cases,
)
from tests.ranks import layout as process_groups

ROUTER = ".gate.weight"
TRAINED = {"router_trainable": True}
FULL = {"recompute_granularity": "full"}
TENSORWISE, DELAYED = (FP8 | {"fp8_recipe": recipe} for recipe in ("tensorwise", "delayed"))
LENGTHS = [(3, 40, 2, 5), (17, 60, 11, 1), (24, 33, 7, 15), (31, 21, 9, 9)]
EXPERT_FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral")
SEPARATE = ep(2, **tp(2), expert_tensor_parallel_size=1)
# Ranks -> family and layout of each case.
CASES: dict[int, list[tuple[str, Layout]]] = {
    1: [
        *((family, Layout("exact", model=EXACT, moe=TRAINED)) for family in EXPERT_FAMILIES),
        ("qwen3_moe", Layout("plain", model=PLAIN, moe=TRAINED)),
        ("qwen3_moe", Layout("bf16", model=TE, moe=TRAINED)),
        ("qwen3_moe", Layout("blockwise", model=BLOCKWISE, moe=TRAINED, pack_multiple=16)),
        ("qwen3_moe", Layout("tensorwise", model=TENSORWISE, moe=TRAINED, pack_multiple=16)),
        ("qwen3_moe", Layout("delayed", model=DELAYED, moe=TRAINED, pack_multiple=16)),
    ],
    2: [
        ("qwen3_moe", Layout("ep2-fp32-frozen", TWO_RANKS, ep(2), model=FP32)),
        ("mixtral", Layout("ep2-recompute-fp32", TWO_RANKS, ep(2, **FULL), model=FP32, moe=TRAINED)),
        ("qwen2_moe", Layout("ep2-tp2-sp-fp32", PACKED, SEPARATE, model=FP32, moe=TRAINED)),
        ("qwen3_moe", Layout("ep2", TWO_RANKS, ep(2), model=TE, moe=TRAINED)),
        ("qwen3_moe", Layout("ep2-blockwise", TWO_RANKS, ep(2), model=BLOCKWISE, moe=TRAINED, pack_multiple=16)),
        ("qwen3_moe", Layout("ep2-delayed", TWO_RANKS, ep(2), model=DELAYED, moe=TRAINED, pack_multiple=16)),
    ],
}
IN_FP32 = [(family, layout.name) for of_size in CASES.values() for family, layout in of_size if layout.model == FP32]
IN_FP8 = ["blockwise", "tensorwise", "delayed", "ep2-blockwise", "ep2-delayed"]
Found = dict[tuple[str, str], list[RankResult]]


def _run(models: Path, cases: list[Case]) -> tuple[dict[str, RankResult], Counter[str]]:
    # Users may not have Transformer Engine's layers in float32; the exact comparison needs them.
    with mock.patch.object(resolve, "uses_transformer_engine", lambda model: model.implementation != "local"):
        return run_cases(models, cases, batches_of(LENGTHS)), calls


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in EXPERT_FAMILIES:
        for seed, name in enumerate(("policy", "reference")):
            make_model(folder / family / name, family, seed)
    return folder


@pytest.fixture(scope="module")
def results(models: Path) -> Found:
    """By family and layout: every rank's result. Each world size is launched once."""
    found: Found = {}
    for size, of_size in CASES.items():
        cases = [Case(family, DPO, layout) for family, layout in of_size]
        ranks = run_distributed(_run, size, models, cases)
        for _, called in ranks:
            assert called["te_general_grouped_gemm"] and called["fused_multi_row_padding"], called
        found |= {(case.family, case.layout.name): [rank[case.name] for rank, _ in ranks] for case in cases}
    return found


def gradients(found: Found, models: Path, family: str, name: str) -> dict[str, Tensor]:
    """Of the first step, by Hugging Face's names."""
    return huggingface_tensors([rank.gradients for rank in found[family, name]], models / family / "policy")


@pytest.mark.parametrize(("family", "name"), IN_FP32)
def test_grouped_products_are_exact_in_float32(family: str, name: str, results: Found, models: Path) -> None:
    ours, exact = (gradients(results, models, family, each) for each in (name, "exact"))
    is_frozen = name.endswith("frozen")
    assert any(parameter.endswith(ROUTER) for parameter in ours) is not is_frozen
    exact = {parameter: each for parameter, each in exact.items() if not is_frozen or not parameter.endswith(ROUTER)}
    error = difference(ours, exact)
    print(f"{family} {name}: gradients differ by {error:.2e} from plain layers")
    assert error < 2e-5  # as in `test_ranks`
    if not is_frozen:  # a router that has moved changes the second loss
        torch.testing.assert_close(losses(results[family, name]), losses(results[family, "exact"]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["bf16", "ep2"])
def test_grouped_products_are_as_exact_as_plain_ones_in_bfloat16(name: str, results: Found, models: Path) -> None:
    exact, plain, ours = (gradients(results, models, "qwen3_moe", each) for each in ("exact", "plain", name))
    errors = difference(ours, exact), difference(plain, exact)
    print(f"{name}: gradient error {errors[0]:.2e} (plain {errors[1]:.2e})")
    assert errors[0] < 1.5 * errors[1] < 0.1


@pytest.mark.parametrize("name", IN_FP8)
def test_experts_train_in_fp8(name: str, results: Found) -> None:
    """Rounding moves the loss of a dense model by up to 12 %: `tests.gpu.test_training.rounding_errors`."""
    ours, one = results["qwen3_moe", name], results["qwen3_moe", "bf16"]
    print(f"{name}: losses {losses(ours).tolist()}, in bfloat16 {losses(one).tolist()}")
    assert all(math.isfinite(norm) for rank in ours for norm in rank.grad_norms)
    torch.testing.assert_close(losses(ours), losses(one), rtol=0.2, atol=0)


@contextmanager
def trained(folder: Path, model: dict[str, Any], checkpoint: Path | None) -> Iterator[Policy]:
    """A policy with these layers, from a checkpoint, or else after one step from the weights in `folder`."""
    layout = Layout("saved", PACKED, distributed_optimizer=True, model=model, pack_multiple=16)
    config = make_config(folder / "policy", DPO, layout)
    with process_groups() as groups:
        resolved = resolve.resolve_model(config.model, config.parallel)
        policy = build_policy(config, resolved, groups, max_steps=2)
        if checkpoint is not None:
            load_checkpoint(checkpoint, policy.chunks, policy.optimizer)
        else:
            roles = config.objective.roles.all
            packs = my_packs(batches_of(LENGTHS)[0], 0, layout, roles, groups)
            references = ReferenceLogprobs(roles, torch.zeros(len(LENGTHS), len(roles)))
            policy.step(packs, objective_loss(config.objective, references, groups), groups)
        yield policy


def scales(policy: Policy) -> dict[str, Tensor]:
    """What FP8's delayed recipe keeps of all linear layers. Attention computes nothing in FP8."""
    return {
        f"{name}.{side}.{key}": getattr(module.fp8_meta[side], key).clone()
        for chunk in policy.chunks
        for name, module in chunk.named_modules()
        for side in ("scaling_fwd", "scaling_bwd")
        for key in ("scale", "amax_history")
        if "linear" in name and side in getattr(module, "fp8_meta", {})
    }


def check_roles(policy: Policy) -> None:
    """What is stored of an expert is that of its own input and weight, where Transformer Engine's kernels find it."""
    layers = [module for chunk in policy.chunks for module in chunk.modules()]
    grouped = [layer for layer in layers if hasattr(layer, "num_gemms") and hasattr(layer, "quantizers")]
    assert grouped
    for layer in grouped:
        for number in range(layer.num_gemms):
            kept = delayed_scales(layer, number)["scaling_fwd.scale"]
            for place, role in enumerate(("input", "weight")):
                position = layer._offsets[role] + number * layer._num_fp8_tensors_per_gemm["fwd"]
                assert kept[place] == layer.quantizers["scaling_fwd"][position].scale


def _saved_by_turns(folder: Path, models: Path) -> None:
    """Plain layers save, grouped ones load it and save, plain ones load that and save; and FP8's scales come back."""
    path = None
    for number, model in enumerate((PLAIN, TE, PLAIN)):
        with trained(models / "qwen2_moe", model, path) as policy:
            path = save(folder / str(number), policy)
    with trained(models / "qwen3_moe", DELAYED, None) as policy:
        check_roles(policy)
        wanted, path = scales(policy), save(folder / "delayed", policy)
    with trained(models / "qwen3_moe", DELAYED, path) as policy:
        found = scales(policy)
    assert any(name.endswith("experts.linear_fc1.scaling_fwd.scale") for name in wanted)
    assert any(bool((each != 1).any()) for name, each in wanted.items() if name.endswith("scale"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_plain_and_grouped_experts_read_each_others_checkpoints(models: Path, tmp_path: Path) -> None:
    run_distributed(_saved_by_turns, 1, tmp_path, models)
    plain, grouped, again = (
        read_whole(next(path.glob("**/.metadata")).parent) for path in map(tmp_path.joinpath, "012")
    )
    assert any("experts.linear_fc1.weight" in name and "optimizer" in name for name in plain)
    for found in (grouped, again):
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)

"""Loss, metrics, every gradient and the gradient norm, against transformers on one process.

Each world size is launched once, with the cases of all tests that are selected. Of each layout, one case takes two
optimizer steps: the second loss shows that the update was right, too. The same cases run with both versions of
Megatron-Core. The others differ from them in what depends on no version: objectives, mixtures, unshared prompts.
"""

import functools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_solopo.config import LoRAConfig, ObjectiveConfig
from megatron_solopo.data.packing import build_pack
from megatron_solopo.parallel.context import shard_indices
from tests.distributed import run_distributed
from tests.layouts import cp, ep, pp, stages, tp
from tests.parity import plain
from tests.parity.layouts import (
    ADAM_EPS,
    LEARNING_RATE,
    ONE_EACH,
    ONE_PACK,
    PACKED,
    TWO_BY_TWO,
    TWO_RANKS,
    TWO_RANKS_UNEVEN,
    UNEVEN,
    UNPACKED,
    Case,
    Layout,
    RankResult,
    huggingface_tensors,
    mean_metrics,
    run_cases,
    tokenized,
)
from tests.parity.plain import Row
from tests.tiny_models import FAMILIES, IDLE_EXPERT, VOCAB_SIZE, make_adapter, make_model

LOSS_TOLERANCE, GRADIENT_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4, 1e-4
# Two updates of about 1e-3, read off weights of about 0.1 in fp32: the subtraction keeps four digits.
UPDATE_TOLERANCE = 2e-3
NUM_TRIPLETS = 4


DPO_BOTH = {"name": "solopo", "loss_type": "dpo", "beta": 0.1, "align": "both"}
ORPO_NLL = {"name": "solopo", "loss_type": "orpo", "beta": 0.1, "nll_coefficient": 0.5}
# The reference's answers are behind the short context, the policy's behind the long one.
LONGPO = {"name": "long_po", "loss_type": "dpo", "beta": 0.1, "nll_coefficient": 0.3}
# Weights of tokens and of pairs; the NLL has neither.
WEIGHTED = {
    "name": "solopo",
    "loss_type": "dpo_norm",
    "beta": 0.5,
    "ld_alpha": 0.3,
    "use_weighting": True,
    "nll_coefficient": 0.2,
}
# A term per token beside the alignment of rewards.
TOKENS = {
    "name": "solopo",
    "loss_type": "simpo",
    "beta": 2.0,
    "token_alignment": "reverse_kl",
    "token_alignment_weight": 3.0,
}
PLAIN_DPO = [{"name": name, "loss_type": "dpo", "beta": 0.1} for name in ("short_po", "long_po")]
OBJECTIVES: list[dict[str, Any]] = [
    {"name": "solopo", "loss_type": "dpo", "beta": 0.1},
    {
        "name": "solopo",
        "loss_type": "dpo",
        "beta": 0.1,
        "label_smoothing": 0.2,
        "distance": "huber",
        "huber_delta": 0.3,
    },
    {"name": "solopo", "loss_type": "simpo", "beta": 2.0, "gamma": 0.7, "align": "both", "distance": "l2"},
    {"name": "solopo", "loss_type": "orpo", "beta": 0.1, "orpo_lambda": 0.3, "distance": "huber"},
    {"name": "solopo", "loss_type": "ipo", "beta": 0.2, "alpha": 0.5},
    {"name": "solopo", "loss_type": "cpo", "beta": 0.1, "nll_coefficient": 1.0, "distance": "l1"},
    {"name": "solopo", "loss_type": "hinge", "beta": 0.05},
    {"name": "solopo", "loss_type": "robust", "beta": 0.1, "label_smoothing": 0.1, "align": "chosen"},
    {"name": "solopo", "loss_type": "simpo", "beta": 2.0, "detach_short": True},
    {"name": "solopo", "loss_type": "apo_zero", "beta": 0.1, "ld_alpha": 0.0, "align": "both"},
    {"name": "solopo", "loss_type": "apo_down", "beta": 0.1},
    {"name": "solopo", "loss_type": "exo_pair", "beta": 0.1, "label_smoothing": 0.1},
    {"name": "solopo", "loss_type": "nca_pair", "beta": 0.1},
    {"name": "solopo", "loss_type": "sppo_hard", "beta": 0.1},
    {"name": "short_po", "loss_type": "simpo", "beta": 2.0, "use_weighting": True},
    {"name": "short_po", "loss_type": "dpo", "beta": 0.1},
    {"name": "short_po", "loss_type": "simpo", "beta": 2.0},
    {"name": "long_po", "loss_type": "dpo", "beta": 0.1},
    {"name": "long_po", "loss_type": "orpo", "beta": 0.1},
]

LAYOUTS: dict[int, list[Layout]] = {
    1: [
        Layout("one-pack", ONE_PACK),
        Layout("packed", PACKED),
        Layout("unpacked", UNPACKED),
        Layout("uneven-accumulation", UNEVEN),
        Layout("distributed-optimizer", PACKED, distributed_optimizer=True),
        Layout("chunked-head", PACKED, chunk_tokens=5),
        Layout("full-recompute", PACKED, {"recompute_granularity": "full"}),
        Layout("selective-recompute", PACKED, {"recompute_granularity": "selective"}),
        Layout("recompute-mlp", PACKED, {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
        Layout("padded-pack", UNEVEN, pack_multiple=64),
    ],
    2: [
        Layout("tp2-sp", PACKED, tp(2)),
        Layout("tp2-without-sp", PACKED, tp(2, sequence_parallel=False)),
        Layout("tp2-chunked-recompute", UNEVEN, tp(2, recompute_granularity="full"), chunk_tokens=3),
        Layout("pp2", UNPACKED, pp(2)),
        Layout("pp2-vpp2", UNPACKED, pp(2, 2)),
        Layout("pp2-uneven", UNPACKED, pp(2, **stages("Et|tttL"))),
        Layout("pp2-vpp2-uneven", UNPACKED, pp(2, 2, **stages("E|tt|t|tL"))),
        Layout("pp2-vpp2-recompute", PACKED, pp(2, 2, recompute_granularity="full"), distributed_optimizer=True),
        Layout("cp2", PACKED, cp(2)),
        Layout("cp2-one-pack", ONE_PACK, cp(2, recompute_granularity="selective"), distributed_optimizer=True),
        Layout("dp2", TWO_RANKS),
        Layout("dp2-uneven", TWO_RANKS_UNEVEN, distributed_optimizer=True),
    ],
    4: [
        Layout("tp4-fewer-kv-heads", PACKED, tp(4)),
        Layout("pp4", UNPACKED, pp(4)),
        Layout("pp4-ends-alone", UNPACKED, pp(4, **stages("E|ttt|t|L"))),
        Layout("cp4", PACKED, cp(4)),
        Layout("cp4-padded-pack", PACKED, cp(4), pack_multiple=128),
        # Triplet 0 alone in a pack: three of the four ranks hold no response token, see `make_rows`.
        Layout("cp4-lonely", UNPACKED, cp(4), share_prompts=False),
        Layout("tp2-cp2-lonely", UNPACKED, tp(2, **cp(2)), share_prompts=False),
        Layout("tp2-pp2", UNPACKED, tp(2, **pp(2))),
        Layout("tp2-pp2-vpp2", UNPACKED, tp(2, **pp(2, 2)), distributed_optimizer=True),
        Layout("tp2-cp2", PACKED, tp(2, **cp(2))),
        Layout("pp2-cp2", UNPACKED, pp(2, **cp(2))),
        Layout("tp2-dp2", TWO_RANKS, tp(2), distributed_optimizer=True),
        Layout("pp2-dp2", TWO_RANKS_UNEVEN, pp(2)),
        Layout("cp2-dp2", TWO_RANKS, cp(2), distributed_optimizer=True),
    ],
    8: [
        Layout("tp2-pp2-cp2", UNPACKED, tp(2, **pp(2), **cp(2))),
        Layout("tp2-pp2-vpp2-cp2", UNPACKED, tp(2, **pp(2, 2), **cp(2)), distributed_optimizer=True),
    ],
}


# One row of each objective, so that some packs lack some of the sources.
MIXTURE = ("sft", "solopo", "long_po", "short_po")
WITH_MIXTURE = ("one-pack", "uneven-accumulation", "tp2-sp", "pp2", "cp2", "dp2", "dp2-uneven", "tp2-cp2")
# Mixtures of objectives with experts, adapters, and weights of tokens and pairs.
WITH_WEIGHTED_MIXTURE = ("uneven-accumulation", "cp2")
WITH_EXPERT_MIXTURE = ("padded-pack", "ep2-uneven", "ep2-within-tp2")
WITH_REPLAYED_MIXTURE = ("replay-recompute", "replay-cp2")
WITH_ADAPTER_MIXTURE = ("packed", "dp2-distributed")
# With `align: chosen`, the short prompt is shared and the long one is not.
ALIGN_CHOSEN = ("tp2-sp", "pp2-vpp2", "cp2", "cp4", "tp2-cp2", "cp4-lonely", "tp2-cp2-lonely")
WITH_WEIGHTS = ("packed", "chunked-head", "tp2-chunked-recompute", "pp2", "cp2", "tp2-cp2")
WITH_TOKENS = (
    *("packed", "unpacked", "chunked-head", "tp2-sp", "tp2-chunked-recompute", "pp2", "cp2", "dp2-uneven"),
    *("tp2-cp2", "cp4-lonely", "pp2-cp2"),
)
WITH_EXPERT_TOKENS = ("padded-pack", "ep2-uneven", "replay-cp2")
WITH_ADAPTER_TOKENS = ("packed", "cp2")
WITH_LONGPO = ("packed", "cp2", "pp2", "tp2-dp2")
TRAINED = {"router_trainable": True}
REPLAYED = {"replay": "short"}
BALANCED = TRAINED | {"aux_loss_coefficient": 0.03, "z_loss_coefficient": 0.02}
ONE_EXPERT_RANK = {"expert_tensor_parallel_size": 1}
EXPERT_LAYOUTS: dict[int, list[Layout]] = {
    1: [
        Layout("routers", PACKED, moe=TRAINED),
        Layout("padded-pack", UNEVEN, pack_multiple=64, moe=BALANCED),
        Layout(
            "routers-recompute", UNPACKED, {"recompute_granularity": "full"}, moe=TRAINED, distributed_optimizer=True
        ),
        Layout("recompute-mlp", PACKED, {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
        Layout("replay-recompute", UNEVEN, {"recompute_granularity": "full"}, moe=REPLAYED | BALANCED),
    ],
    2: [
        Layout("ep2", TWO_RANKS, ep(2), moe=TRAINED),
        Layout("ep2-uneven", TWO_RANKS_UNEVEN, ep(2), distributed_optimizer=True),
        Layout("ep2-within-tp2", PACKED, ep(2, **tp(2), **ONE_EXPERT_RANK), moe=BALANCED),
        Layout("ep2-within-cp2", UNPACKED, ep(2, **cp(2), recompute_granularity="full"), moe=BALANCED),
        Layout("expert-tp2", PACKED, tp(2), moe=TRAINED),
        Layout("pp2-vpp2", UNPACKED, pp(2, 2), moe=TRAINED),
        Layout("replay-ep2-within-tp2", PACKED, ep(2, **tp(2), **ONE_EXPERT_RANK), moe=REPLAYED | BALANCED),
        Layout("replay-cp2", PACKED, ep(2, **cp(2)), moe=REPLAYED),
    ],
    4: [
        Layout("ep4", ONE_EACH, ep(4), moe=TRAINED),
        Layout("ep4-within-tp2", TWO_RANKS, ep(4, **tp(2), **ONE_EXPERT_RANK), moe=TRAINED, distributed_optimizer=True),
        Layout("ep2-expert-tp2", TWO_RANKS, ep(2, **tp(2)), moe=TRAINED),
        Layout("ep2-pp2", TWO_RANKS_UNEVEN, ep(2, **pp(2)), moe=BALANCED),
        Layout("ep2-pp2-vpp2", TWO_BY_TWO, ep(2, **pp(2, 2)), distributed_optimizer=True),
        Layout("ep2-cp2", TWO_RANKS, ep(2, **cp(2)), moe=TRAINED),
        Layout("ep2-dp2", ONE_EACH, ep(2), moe=TRAINED, distributed_optimizer=True),
        Layout("replay-ep2-tp2", TWO_RANKS, ep(2, **tp(2)), moe=REPLAYED | BALANCED),
        Layout("replay-ep2-pp2", TWO_RANKS_UNEVEN, ep(2, **pp(2)), moe=REPLAYED),
    ],
}


# One norm takes the heads of all tensor-parallel ranks.
NORMS_ALL_HEADS = ("routers", "ep2-within-tp2", "expert-tp2", "ep2-expert-tp2", "ep2-pp2-vpp2")


def expert_cases(world_size: int) -> list[Case]:
    """The layouts of experts: all of them with one family, and some with the others and without shared prompts."""
    layouts = EXPERT_LAYOUTS.get(world_size, [])
    found = [Case("qwen2_moe", DPO_BOTH, layout) for layout in layouts]
    found += [Case("qwen3_moe", ORPO_NLL, layout) for layout in layouts[:2]]
    found += [Case("mixtral", ORPO_NLL, unshared(layout)) for layout in layouts[:2]]
    found += [Case("olmoe", DPO_BOTH, layout) for layout in layouts if layout.name in NORMS_ALL_HEADS]
    for objective, names, mixture in (
        (ORPO_NLL, WITH_EXPERT_MIXTURE, MIXTURE),
        (DPO_BOTH, WITH_REPLAYED_MIXTURE, MIXTURE),
        (TOKENS, WITH_EXPERT_TOKENS, ()),
    ):
        found += [Case("qwen3_moe", objective, each, mixture=mixture) for each in layouts if each.name in names]
    if world_size == 1:
        replayed = next(layout for layout in layouts if layout.moe.get("replay"))
        # Probabilities of the chosen experts that are divided by their sum; and rewards of 0.
        found += [Case("qwen3_moe", ORPO_NLL, replayed), Case("qwen2_moe", DPO_BOTH, replayed, reference="policy")]
    return found


ALL_LINEAR = {"rank": 3, "alpha": 6.0}
SOME = {"rank": 4, "alpha": 2.0, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
FULL = {"recompute_granularity": "full"}
MLP = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
ADAPTER_LAYOUTS: dict[int, list[Layout]] = {
    1: [
        Layout("packed", PACKED, lora=ALL_LINEAR),
        Layout("recompute", UNEVEN, FULL, lora=ALL_LINEAR, distributed_optimizer=True),
        Layout("recompute-mlp", UNPACKED, MLP, lora=SOME),
    ],
    2: [
        Layout("tp2", PACKED, tp(2), lora=ALL_LINEAR),
        Layout("tp2-without-sp", UNEVEN, tp(2, sequence_parallel=False), lora=ALL_LINEAR),
        Layout("tp2-recompute", PACKED, tp(2, **FULL), lora=SOME),
        Layout("pp2", UNPACKED, pp(2), lora=ALL_LINEAR),
        Layout("pp2-vpp2", UNPACKED, pp(2, 2), lora=SOME, distributed_optimizer=True),
        Layout("cp2", PACKED, cp(2), lora=ALL_LINEAR),
        Layout("dp2", TWO_RANKS, lora=ALL_LINEAR),
        Layout("dp2-distributed", TWO_RANKS, lora=ALL_LINEAR, distributed_optimizer=True),
    ],
    4: [
        Layout("tp4-fewer-kv-heads", PACKED, tp(4), lora=ALL_LINEAR),
        Layout("tp2-pp2", UNPACKED, tp(2, **pp(2)), lora=SOME),
        Layout("tp2-cp2", PACKED, tp(2, **cp(2)), lora=ALL_LINEAR),
        Layout("tp2-dp2", TWO_RANKS, tp(2), lora=ALL_LINEAR, distributed_optimizer=True),
    ],
}
# Tied weights with biases, and untied ones with norms of queries and keys.
ADAPTED_FAMILIES = ("qwen2_tied", "qwen3")


def unshared(layout: Layout) -> Layout:
    """The same layout, in which every response has its own prompt."""
    return replace(layout, share_prompts=False)


def shared(layout: Layout) -> Layout:
    """The same layout, in which responses share their prompt."""
    return replace(layout, share_prompts=True)


def adapter_cases(world_size: int) -> list[Case]:
    """The layouts of adapters; every one with one family, and the first of each kind with the other."""
    layouts = ADAPTER_LAYOUTS.get(world_size, [])
    other = [next(each for each in layouts if each.lora is lora) for lora in (ALL_LINEAR, SOME) if layouts]
    found = [Case("qwen2_tied", DPO_BOTH, each) for each in layouts] + [Case("qwen3", DPO_BOTH, each) for each in other]
    found += [Case("qwen3", DPO_BOTH, each, mixture=MIXTURE) for each in layouts if each.name in WITH_ADAPTER_MIXTURE]
    return found + [Case("qwen3", TOKENS, each) for each in layouts if each.name in WITH_ADAPTER_TOKENS]


@functools.cache
def cases(world_size: int) -> list[Case]:
    """Every layout of dense models, and those of experts and of adapters."""
    found = dense_cases(world_size) + expert_cases(world_size) + adapter_cases(world_size)
    return [case if depends_on_version(case) else replace(case, steps=1) for case in found]


def depends_on_version(case: Case) -> bool:
    """Whether another Megatron-Core may change what no other case shows: its layers, layouts and optimizer."""
    return case.objective is DPO_BOTH and not case.mixture and case.reference_context is None


def dense_cases(world_size: int) -> list[Case]:
    """Every layout with tied and untied weights, with and without a reference; on one rank also the rest.

    Prompts are shared with tied weights, and not with untied ones.
    """
    layouts = LAYOUTS[world_size]
    found = [Case("qwen2_tied", DPO_BOTH, layout) for layout in layouts]
    found += [Case("llama3", ORPO_NLL, unshared(layout)) for layout in layouts if layout.name != "pp2-vpp2-recompute"]
    if world_size == 8:
        return [*found, Case("qwen3", DPO_BOTH, layouts[-1], reference="policy")]
    found += [Case("qwen3", DPO_BOTH, layouts[0], reference="policy")]
    found += [Case("qwen3", objective, layouts[0], reference="policy") for objective in PLAIN_DPO]
    behind_short = {"reference_context": "short"}
    found += [Case("qwen2", DPO_BOTH, layout, mixture=MIXTURE) for layout in layouts if layout.name in WITH_MIXTURE]
    found += [Case("qwen2", LONGPO, layout, **behind_short) for layout in layouts if layout.name in WITH_LONGPO]
    found += [Case("qwen2", OBJECTIVES[0], shared(layout)) for layout in layouts if layout.name in ALIGN_CHOSEN]
    found += [Case("qwen2", WEIGHTED, layout) for layout in layouts if layout.name in WITH_WEIGHTS]
    weighted = [layout for layout in layouts if layout.name in WITH_WEIGHTED_MIXTURE]
    found += [Case("qwen2", WEIGHTED, layout, mixture=MIXTURE) for layout in weighted]
    found += [Case("qwen2_tied", TOKENS, layout) for layout in layouts if layout.name in WITH_TOKENS]
    found += [Case("qwen2", TOKENS | {"align": "both"}, unshared(layouts[0]))] if world_size == 1 else []
    # Norms of queries and keys: with and without sequence parallelism, whole heads and split groups.
    found += [Case("qwen3", DPO_BOTH, layout) for layout in layouts if layout.name.startswith("tp")][:2]
    if world_size == 1:
        found += [Case("qwen2", objective, Layout(f"objective-{n}")) for n, objective in enumerate(OBJECTIVES)]
        found += [Case("qwen2", DPO_BOTH, layouts[0], **behind_short)]
        found += [Case(family, DPO_BOTH, Layout("family")) for family in FAMILIES]
    else:
        found += [Case("qwen3", DPO_BOTH, layouts[-1], reference="policy")]
    return found


def of_each_case(is_meant: Callable[[Case], bool] = lambda _: True) -> Any:
    """Parametrize a test with the world sizes and cases that are meant. Eight ranks are slow."""
    found = []
    for world_size in LAYOUTS:
        for case in filter(is_meant, cases(world_size)):
            slow = [pytest.mark.slow] if world_size == 8 else []
            both_versions = [pytest.mark.parity] if depends_on_version(case) else []
            found.append(pytest.param(world_size, case, marks=slow + both_versions))
    return pytest.mark.parametrize(("world_size", "case"), found, ids=lambda value: getattr(value, "name", str(value)))


FIRST = cases(1)[0]


def make_rows(count: int, seed: int) -> list[Row]:
    """Triplets of odd lengths. Some tokens of every other row's answers do not count, as those of tools do not.

    The first one's answers are a single token, and its prompts end where context-parallel rank 0
    holds that token's predictor, for 2 and for 4 ranks: the others hold no response token of it.
    The last one's answers are longer than its long prompt.
    """
    generator = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [generator.randrange(VOCAB_SIZE) for _ in range(length)]

    def row(number: int, short: int, long: int, chosen: int, rejected: int) -> dict[str, Any]:
        return {
            "id": f"{seed}-{number}",
            "prompt_short": tokens(short),
            "prompt_long": tokens(long),
            "chosen": tokens(chosen),
            "rejected": tokens(rejected),
        }

    masks = random.Random(seed)

    def counted(length: int) -> list[bool]:
        mask = [masks.random() < 0.6 for _ in range(length)]
        return mask if any(mask) else [True] * length

    between = generator.randint
    others = [row(n, between(1, 11), between(13, 47), between(2, 9), between(2, 9)) for n in range(1, count - 1)]
    found = [row(0, 1, 15, 1, 1), *others, row(count - 1, 7, 11, 23, 14)]
    for each in found[1::2]:
        each |= {f"{answer}_mask": counted(len(each[answer])) for answer in ("chosen", "rejected")}
    return found


BATCHES = [make_rows(NUM_TRIPLETS, seed=0), make_rows(NUM_TRIPLETS, seed=1)]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_model(folder / family / "policy", family, seed=0)
        make_model(folder / family / "reference", family, seed=1)
    for family in ADAPTED_FAMILIES:
        for lora in (ALL_LINEAR, SOME):
            make_adapter(folder / family / "policy", LoRAConfig(**lora))
    return folder


@pytest.fixture(scope="session")
def results(models: Path, request: pytest.FixtureRequest) -> Any:
    """All ranks' results of a world size in the cases of the selected tests, launched at first use."""
    selected = {(1, FIRST.name)}
    for item in request.session.items:
        if item.path == Path(__file__) and {"world_size", "case"} <= set(item.fixturenames):
            parameters = item.callspec.params
            selected.add((parameters["world_size"], parameters["case"].name))

    @functools.cache
    def launch(world_size: int) -> Any:
        own = [case for case in cases(world_size) if (world_size, case.name) in selected]
        return run_distributed(run_cases, world_size, models, own, BATCHES)

    return launch


@pytest.fixture(scope="session")
def expected(models: Path) -> Any:
    """The plain run of a case, whatever its layout."""
    done: dict[str, list[plain.PlainStep]] = {}

    def run(case: Case) -> list[plain.PlainStep]:
        settings = (
            case.objective,
            case.reference,
            case.reference_context,
            case.layout.moe,
            case.layout.lora,
            case.mixture,
            case.steps,
        )
        key = f"{case.family} {settings}"
        if hasattr(FAMILIES[case.family], "num_experts_per_tok"):
            key += f" {case.layout.share_prompts}"  # of dense models, nothing counts prompts
        if key not in done:
            folder = models / case.family
            reference = folder / case.reference
            done[key] = plain.train(
                case.objective,
                folder / "policy",
                reference,
                BATCHES[: case.steps],
                LEARNING_RATE,
                ADAM_EPS,
                routers=case.trains_routers,
                aux=case.layout.moe.get("aux_loss_coefficient", 0.0),
                z=case.layout.moe.get("z_loss_coefficient", 0.0),
                adapter=case.adapter(folder / "policy"),
                replay="replay" in case.layout.moe,
                share_prompts=case.layout.share_prompts,
                reference_context=case.reference_context,
                names=case.mixture,
            )
        return done[key]

    return run


@functools.cache
def parameters(model: Path) -> dict[str, Tensor]:
    """A model's parameters, by their names in published checkpoints."""
    return plain.parameters(model)


@of_each_case()
def test_equals_transformers_on_one_process(
    world_size: int, case: Case, results: Any, expected: Any, models: Path
) -> None:
    ranks: list[RankResult] = [rank[case.name] for rank in results(world_size)]
    steps = expected(case)
    for number, step in enumerate(steps):
        metrics = mean_metrics(ranks, number, case, NUM_TRIPLETS)
        assert metrics["loss"] == pytest.approx(step.loss, rel=LOSS_TOLERANCE)
        for rank in ranks:
            assert rank.grad_norms[number] == pytest.approx(step.grad_norm, rel=NORM_TOLERANCE)
            assert rank.routing[number : number + 1] == [pytest.approx(step.routing, rel=1e-5)] * bool(step.routing)
    policy = models / case.family / "policy"
    lora, adapter = case.lora, case.adapter(policy)
    updated = huggingface_tensors([rank.parameters for rank in ranks], policy, lora)
    before = parameters(policy) | ({} if adapter is None else plain.adapter_parameters(adapter))
    changes = {name: updated[name] - before[name] for name in before}
    assert_close(changes, {name: steps[-1].parameters[name] - before[name] for name in before}, UPDATE_TOLERANCE)
    if not case.layout.distributed_optimizer:
        gradients = huggingface_tensors([rank.gradients for rank in ranks], policy, lora)
        assert_close(gradients, steps[0].gradients, GRADIENT_TOLERANCE)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor, by the norm of its difference relative to its own norm."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Where nothing should change, nothing may.
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_an_expert_without_any_token_is_among_the_cases(family: str, expected: Any) -> None:
    case = next(case for case in expert_cases(1) if case.family == family)
    gradients = expected(case)[0].gradients
    idle = [name for name, tensor in gradients.items() if f"experts.{IDLE_EXPERT}.up_proj" in name and not tensor.any()]
    assert idle


@pytest.mark.parametrize(("context", "tensor"), [(4, 1), (2, 2)])
@pytest.mark.parametrize(("objective", "share"), [(DPO_BOTH, False), (OBJECTIVES[0], True)])
def test_ranks_without_a_response_token_are_among_the_cases(
    context: int, tensor: int, objective: dict[str, Any], share: bool
) -> None:
    """The layouts called lonely are what they are called: their first pack's rows lie on one rank."""
    roles = ObjectiveConfig(**objective).roles.all
    for batch in BATCHES:
        pack = build_pack([tokenized(batch[0], 0)], roles, 2 * context * tensor, share_prompts=share)
        for rank in range(context):
            here = torch.isin(pack.response_rows_N, shard_indices(pack.cu_seqlens_B1, context, rank))
            assert int(here.sum()) == (len(roles) if rank == 0 else 0)


@of_each_case(
    lambda case: case.family == "qwen2_tied" and case.objective is DPO_BOTH and not case.lora and not case.mixture
)
def test_every_metric_is_the_same_under_every_layout(world_size: int, case: Case, results: Any) -> None:
    """Against the first case of one rank, which `test_equals_transformers_on_one_process` checks."""
    reference = mean_metrics([rank[FIRST.name] for rank in results(1)], 0, FIRST, NUM_TRIPLETS)
    metrics = mean_metrics([rank[case.name] for rank in results(world_size)], 0, case, NUM_TRIPLETS)
    assert metrics == pytest.approx(reference, rel=1e-4, abs=1e-5)


@of_each_case(lambda case: case.reference == "policy")
def test_dpo_starts_at_ln_2_when_the_reference_is_the_policy(world_size: int, case: Case, results: Any) -> None:
    metrics = mean_metrics([rank[case.name] for rank in results(world_size)], 0, case, NUM_TRIPLETS)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    rewards = {name: value for name, value in metrics.items() if name.startswith("rewards/")}
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= rewards.keys()
    assert rewards == dict.fromkeys(rewards, 0.0)

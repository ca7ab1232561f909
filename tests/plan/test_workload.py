"""Packs of a plan are those that training would build."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_solopo.architecture.flops import forward_flops
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.layout import packs_per_part
from megatron_solopo.config import ObjectiveConfig
from megatron_solopo.data.batch_plan import plan_global_batch, triplet_sizes
from megatron_solopo.data.blocks import attended_runs
from megatron_solopo.data.loader import GlobalBatchLoader, LoaderSource, Packing, SinglePass, TripletDataset
from megatron_solopo.data.packing import TokenizedTriplet, build_pack
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.errors import UserError
from megatron_solopo.model.segments import plan_segments
from megatron_solopo.parallel.context import shard_indices
from megatron_solopo.plan.layouts import replace_settings
from megatron_solopo.plan.workload import (
    BatchShape,
    Packer,
    pack_shape,
    read_workload,
    stated_workload,
)
from tests.plan.models import load_example
from tests.prepared import make_prepared

NAMES = ("short", "long", "chosen", "rejected")
BATCH = {"global_batch_size": 6}
ROLES = ObjectiveConfig().roles.all
LENGTHS = st.fixed_dictionaries({name: st.integers(1, 70) for name in NAMES})


@given(st.lists(LENGTHS, min_size=1, max_size=3), st.sampled_from([1, 2, 4]), st.sampled_from([1, 64]), st.booleans())
def test_a_shape_is_the_real_packs(triplets: list[dict[str, int]], cp: int, whole: int, share: bool) -> None:
    rows = [
        TokenizedTriplet(
            id=str(number),
            index=number,
            prompts={name: np.ones(lengths[name], int) for name in NAMES[:2]},
            responses={name: np.ones(lengths[name], int) for name in NAMES[2:]},
        )
        for number, lengths in enumerate(triplets)
    ]
    pack = build_pack(rows, ROLES, 2 * cp, whole, share_prompts=share)
    shape = pack_shape(triplets, [ROLES] * len(triplets), 2 * cp, whole, cp, share_prompts=share)
    assert shape.padded_tokens == pack.padded_tokens and shape.tokens == pack.num_tokens
    keys_seen = sum(
        2 * (len(keys) - len(queries)) * len(queries) + len(queries) ** 2
        for queries, keys in ((queries, list(chain(*runs))) for queries, runs in attended_runs(pack.blocks, 1, 0))
    )
    assert shape.squares == keys_seen
    assert shape.longest == int(pack.positions_T.max()) + 1 and shape.num_triplets == pack.num_triplets
    shards = [shard_indices(pack.cu_seqlens_B1, cp, rank) for rank in range(cp)]
    assert shape.response_rows == max(int(torch.isin(pack.response_rows_N, shard).sum()) for shard in shards)
    keys = [sum(plan_segments(pack.blocks, cp, rank).key_lengths) for rank in range(cp)]
    assert shape.attended_keys == max(keys) and shape.shares_prompts == pack.shares_prompts


def test_prepared_lengths_are_those_of_the_rows(tmp_path) -> None:
    path = make_prepared(tmp_path / "prepared", rows=12, eval_count=2, seed=0)
    config, _ = load_example("llama-3.1-8b", f"data.path={path}")
    workload = read_workload(config, None, 0)
    assert workload.num_triplets == 10 and all(len(column) == 10 for column in workload.prompts.values())
    assert (workload.prompts["long"] >= 20).all() and (workload.prompts["short"] <= 13).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("short=10,long=20", "response missing"),
        ("short=10,long=x,response=5", "long=x"),
        ("short=10,long=20,response=5,other=1", "other=1"),
        ("short=0,long=20,response=5", "must be from 1 to"),
        ("short=10,long=20:10,response=5", "LOW at most HIGH"),
        ("short=10,short=11,long=20,response=5", "short is stated twice"),
        ("short=10,long=20,response=²", "response=²"),
        ("short=10,long=99999999999999999999,response=5", "from 1 to 2,147,483,647"),
    ],
)
def test_lengths_that_cannot_be_read_are_named(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        stated_workload(text, 10, 10)
    assert "--tokens" in str(error.value) and "\n" not in str(error.value)


def test_a_batch_is_counted_whole() -> None:
    config, model = load_example("llama-3.1-8b")
    workload = stated_workload("short=500:3000,long=8000:60000,response=100:500", 1000, 512)
    packer = Packer(workload, config, model)
    batch = packer.pack(config, 4)
    assert batch.num_triplets == 128 and batch.num_packs % 4 == 0
    assert 0 <= batch.pad_waste < 0.01 and 0.9 < batch.balance <= 1
    assert len(batch.heaviest_rank) == batch.num_packs // 4
    everything = packer.pack(config, 1)
    mean = _flops(model, everything) / 4
    assert _flops(model, batch) * batch.balance == pytest.approx(mean, rel=5e-4)


def _flops(model: ModelShape, batch: BatchShape) -> float:
    """Forward FLOPs of the heaviest rank without the output layer's, which are few."""
    packs = batch.heaviest_rank
    return forward_flops(model, sum(p.padded_tokens for p in packs), sum(p.squares for p in packs), 0).total


@pytest.mark.parametrize(("model", "lengths"), [("llama-3.1-8b", (4096, 32768)), ("llama-3.1-70b", (8192, 32768))])
def test_data_parallel_ranks_do_equal_work_in_flops(model: str, lengths: tuple[int, int]) -> None:
    """64 triplets with long contexts of log-uniform length over 8 ranks: no rank does 1 % more than the mean."""
    _, architecture = load_example(model)
    for seed in range(5):
        generator = np.random.default_rng(seed)
        long = np.exp(generator.uniform(*np.log(lengths), 64)).astype(np.int64)
        rows = np.arange(64)
        responses = {name: generator.integers(50, 500, 64) for name in ("chosen", "rejected")}
        sizes = triplet_sizes(
            {"short": long // 8, "long": long}, responses, ROLES, 2, architecture, share_prompts=False
        )
        plan = plan_global_batch(sizes.select(rows), max_tokens=65_536, max_triplets=None, num_ranks=8)
        flops = []
        for rank in plan:
            mine = [i for pack in rank for i in pack]
            pairs = [(long[i] // 8, "chosen") for i in mine] + [(long[i] // 8, "rejected") for i in mine]
            pairs += [(long[i], "chosen") for i in mine]
            answers = [responses[answer][i] for (_, answer), i in zip(pairs, mine * 3, strict=True)]
            padded = [-(-(prompt + length) // 2) * 2 for (prompt, _), length in zip(pairs, answers, strict=True)]
            squares = sum(float(length) ** 2 for length in padded)
            flops.append(forward_flops(architecture, float(sum(padded)), squares, float(sum(answers))).total)
        assert max(flops) / np.mean(flops) < 1.01


@pytest.mark.parametrize(
    ("keys", "dp", "words"),
    [
        ({"data": {"max_tokens_per_pack": 100_000}}, 4, "the largest triplet needs 135,680 padded tokens"),
        ({"training": {"global_batch_size": 6}}, 4, "training.global_batch_size=6: must be a multiple of 4"),
    ],
)
def test_what_training_would_refuse_is_refused(keys, dp: int, words: str) -> None:
    config, model = load_example("llama-3.1-8b")
    config = replace_settings(config, **keys)
    with pytest.raises(UserError, match=words):
        Packer(stated_workload("short=3584,long=130560,response=512", 200, 200), config, model).pack(config, dp)


@pytest.mark.parametrize(("dp", "parallel"), [(1, {}), (3, {}), (2, {"pipeline_model_parallel_size": 2})])
def test_a_planned_pass_has_the_packs_that_the_reference_pass_runs(tmp_path: Path, dp: int, parallel: Any) -> None:
    path = make_prepared(tmp_path / "prepared", rows=30, eval_count=1, seed=0)
    config, model = load_example("llama-3.1-8b")
    config = replace_settings(
        config, data={"path": path, "max_tokens_per_pack": 400}, parallel=parallel, training=BATCH
    )
    found = Packer(read_workload(config, None, 0), config, model).single_pass(config, dp)
    prompts = {"short": "prompt_short", "long": "prompt_long"}
    pipeline = parallel.get("pipeline_model_parallel_size", 1)
    packing = Packing(
        sequence_multiple=1,
        max_tokens_per_pack=400,
        dp_rank=0,
        dp_size=dp,
        wanted_packs=packs_per_part(pipeline) if pipeline > 1 else 1,
        share_prompts=True,
    )
    real = SinglePass(TripletDataset(load_prepared(path).train, prompts, model), ROLES, packing, packs_per_part=1000)
    (batch,) = real
    assert abs(found.num_packs - dp * len(batch.packs)) < dp and found.num_packs == len(found.packs)
    assert sum(pack.num_triplets for pack in found.packs) == 29


def test_a_pass_is_planned_with_a_sample() -> None:
    config, model = load_example("llama-3.1-8b")
    config = replace_settings(config, parallel={"pipeline_model_parallel_size": 4})
    lengths = "short=500:3000,long=8000:60000,response=100:500"
    few, many = (
        Packer(stated_workload(lengths, count, 4096), config, model).single_pass(config, 2) for count in (256, 100_000)
    )
    assert few.num_packs >= 2 * packs_per_part(4) and len(many.packs) <= 1024
    sample = sum(pack.num_triplets for pack in many.packs)
    assert many.num_packs == pytest.approx(100_000 / sample * len(many.packs), abs=1)
    assert sum(pack.padded_tokens for pack in many.packs) / len(many.packs) > 0.85 * config.data.max_tokens_per_pack


def test_a_mixture_is_planned_as_training_packs_it(tmp_path: Path) -> None:
    """The first batch of a plan is that of the loader under the same seed."""
    kinds = {"triplets": "triplet", "pairs": "pair", "chats": "instruction"}
    rows = {"triplets": 20, "pairs": 6, "chats": 9}
    for seed, (name, kind) in enumerate(kinds.items()):
        make_prepared(tmp_path / name, rows=rows[name], eval_count=0, seed=seed, kind=kind)
    sources = [
        {"path": tmp_path / "triplets", "weight": 3.0},
        {"path": tmp_path / "pairs", "weight": 2.0, "objective": "short_po"},
        {"path": tmp_path / "chats", "weight": 1.0, "objective": "sft"},
    ]
    config, model = load_example("llama-3.1-8b")
    config = replace_settings(config, training={"global_batch_size": 12})
    data = type(config.data).model_validate({"sources": sources, "max_tokens_per_pack": 400})
    config = config.model_copy(update={"data": data})
    workload = read_workload(config, None, 0)
    assert workload.num_triplets == 35 and "50.0% of" in workload.source

    planned = Packer(workload, config, model).pack(config, 2)
    opened = [load_prepared(source.config.data.directory) for source in config.sources]
    datasets = [
        LoaderSource(
            TripletDataset(each.train, {name: each.prompt_column(name) for name in ("short", "long")}, model),
            source.config.objective.roles.all,
            source.weight,
        )
        for each, source in zip(opened, config.sources, strict=True)
    ]
    ranks = []
    for rank in range(2):
        packing = Packing(1, config.data.share_prompts, 400, rank, 2)
        ranks.append(GlobalBatchLoader(datasets, packing, global_batch_size=12, seed=0).next_batch())
    assert planned.num_packs == ranks[0].num_packs
    heaviest = sorted(pack.padded_tokens for pack in planned.heaviest_rank)
    assert heaviest in [sorted(pack.padded_tokens for pack in rank.packs) for rank in ranks]
    assert {roles for pack in planned.heaviest_rank for roles in pack.roles} == {each.roles for each in datasets}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared pairs and instructions."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, kind in (("pairs", "pair"), ("chats", "instruction")):
        make_prepared(folder / name, rows=4, eval_count=0, seed=0, kind=kind)
    return folder


SHORT_REFERENCE = ("objective.name=long_po", "reference.context=short")


@pytest.mark.parametrize(
    ("name", "overrides", "cause", "of_path", "of_source"),
    [
        ("chats", (), "{} compares two responses; ", "objective.name=sft", "objective: sft"),
        (
            "pairs",
            (),
            "{} needs prompt_short and prompt_long; prepare triplets, or ",
            "objective.name=short_po",
            "objective: short_po",
        ),
        (
            "pairs",
            SHORT_REFERENCE,
            "reference.context=short needs prompt_short and prompt_long; prepare triplets, or ",
            "reference.context=null",
            "objective: short_po",
        ),
    ],
)
def test_rows_that_training_refuses_under_their_objective_are_refused_with_what_helps(
    folder: Path, name: str, overrides: tuple[str, ...], cause: str, of_path: str, of_source: str
) -> None:
    path, key = f"data.path={folder / name}", of_path
    config, _ = load_example("llama-3.1-8b", path, *overrides)
    with pytest.raises(UserError) as error:
        read_workload(config, None, 0)
    assert str(error.value).endswith(f"but {cause.format('objective.name=solopo')}set {key}")
    config, _ = load_example("llama-3.1-8b", path, *overrides, key)
    assert read_workload(config, None, 0).num_triplets == 4

    sources = f"data.sources=[{{path: {folder / name}}}]"
    config, _ = load_example("llama-3.1-8b", "data.path=null", sources, *overrides)
    with pytest.raises(UserError) as error:
        read_workload(config, None, 0)
    advice = f"set `{of_source}` of the source {name} in data.sources"
    assert str(error.value).endswith(f"but {cause.format('its objective solopo')}{advice}")
    sources = f"data.sources=[{{path: {folder / name}, {of_source}}}]"
    config, _ = load_example("llama-3.1-8b", "data.path=null", sources, *overrides)
    assert read_workload(config, None, 0).num_triplets == 4


def test_only_data_that_cannot_be_opened_is_told_of_stated_lengths(tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    for overrides, is_told in (
        ((f"data.path={path}",), True),
        (("data.path=null", f"data.sources=[{{path: {path}}}]"), False),
    ):
        config, _ = load_example("llama-3.1-8b", *overrides)
        with pytest.raises(UserError, match="not a complete prepared directory") as error:
            read_workload(config, None, 0)
        assert ("--tokens" in str(error.value)) is is_told

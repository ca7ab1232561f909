"""Which keys each query sees, against the definition pair by pair; gathered keys; FLOPs by torch's counter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megatron_solopo.architecture.flops import forward_flops
from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.architecture.layout import padded_vocab_size
from megatron_solopo.config import ObjectiveConfig, Role
from megatron_solopo.data.packing import Pack, TokenizedTriplet, build_pack
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.model.segments import Segments, blocks_of, plan_segments, segments_of_sequences
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.context import shard_indices
from megatron_solopo.train.policy import load_model
from megatron_solopo.train.step import logprob_report, run_schedule
from tests.parity.layouts import Layout, make_config
from tests.tiny_models import VOCAB_SIZE, make_model

ROLE_SETS = [ObjectiveConfig().roles.all, tuple(Role)]
LENGTHS = st.lists(st.tuples(*[st.integers(1, 20)] * 4), min_size=1, max_size=3)


def make_pack(lengths: list[tuple[int, int, int, int]], roles: tuple[Role, ...], size: int, share: bool) -> Pack:
    generator = np.random.default_rng(0)
    rows = []
    for number, row in enumerate(lengths):
        short, long, chosen, rejected = (generator.integers(VOCAB_SIZE, size=length) for length in row)
        prompts, responses = {"short": short, "long": long}, {"chosen": chosen, "rejected": rejected}
        rows.append(TokenizedTriplet(str(number), number, prompts, responses))
    return build_pack(rows, roles, 2 * size, share_prompts=share)


def seen(segments: Segments, held: list[int], gathered: list[int]) -> set[tuple[int, int]]:
    """Pairs of positions of the pack: a query and a key that it sees."""
    places = range(sum(segments.key_lengths)) if segments.keys_K is None else segments.keys_K.tolist()
    keys = [gathered[place] for place in places]
    pairs, query, key = [], 0, 0
    for queries, count in zip(segments.query_lengths, segments.key_lengths, strict=True):
        for number in range(queries):
            visible = keys[key : key + count - queries + number + 1]
            pairs += [(held[query + number], each) for each in visible]
        query, key = query + queries, key + count
    assert len(pairs) == len(set(pairs)), "no key counts twice in a softmax"
    return set(pairs)


def defined(pack: Pack) -> set[tuple[int, int]]:
    """The same by definition: earlier positions of the own run, and of the prompt before it."""
    runs, positions, num_blocks = pack.runs_T.tolist(), pack.positions_T.tolist(), len(pack.prompt_lengths_B)
    prompt_of = {run: run for run in range(num_blocks)}
    prompt_of |= {num_blocks + sequence: block for sequence, block in enumerate(pack.blocks_S.tolist())}
    return {
        (query, key)
        for query, run in enumerate(runs)
        for key, other in enumerate(runs)
        if other in (run, prompt_of[run]) and positions[key] <= positions[query]
    }


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from(ROLE_SETS), st.sampled_from([1, 2, 4]), st.booleans())
def test_a_query_sees_its_prompt_and_its_own_response(lengths, roles, size: int, share: bool) -> None:
    pack = make_pack(lengths, roles, size, share)
    shards = [shard_indices(pack.cu_seqlens_B1, size, rank).tolist() for rank in range(size)]
    gathered = [position for shard in shards for position in shard]
    found: set[tuple[int, int]] = set()
    for rank, held in enumerate(shards):
        found |= seen(plan_segments(blocks_of(pack), size, rank), held, gathered)
    assert found == defined(pack)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from(ROLE_SETS), st.sampled_from([1, 2, 4]))
def test_at_most_twice_the_keys_are_gathered_that_unshared_prompts_need(lengths, roles, size: int) -> None:
    shared, unshared = (make_pack(lengths, roles, size, share) for share in (True, False))
    for rank in range(size):
        ours = sum(plan_segments(blocks_of(shared), size, rank).key_lengths)
        # Padding of the longer block may reach into one more chunk of a rank.
        theirs = sum(plan_segments(blocks_of(unshared), size, rank).key_lengths)
        assert ours <= 2 * theirs


def test_sequences_that_share_nothing_have_the_segments_of_their_boundaries() -> None:
    pack = make_pack([(3, 17, 5, 4), (1, 2, 1, 1)], ROLE_SETS[0], 2, share=False)
    for rank in range(2):
        ours = plan_segments(blocks_of(pack), 2, rank)
        of_boundaries = segments_of_sequences(tuple(pack.cu_seqlens_B1.tolist()), 2, rank)
        assert (ours.query_lengths, ours.key_lengths) == (of_boundaries.query_lengths, of_boundaries.key_lengths)
        assert ours.keys_K is not None and torch.equal(ours.keys_K, of_boundaries.keys_K)


@pytest.mark.parametrize("share", [False, True])
def test_flops_are_those_that_torch_counts(tmp_path: Path, share: bool) -> None:
    """Those of the layers' products and of the head. torch does not count attention on a CPU."""
    model = make_model(tmp_path / "model", "llama3")
    config = make_config(model, {"name": "solopo", "loss_type": "simpo"}, Layout("flops"))
    pack = make_pack([(20, 90, 6, 9), (12, 70, 3, 4)], ROLE_SETS[0], 1, share)
    prompts = (20 + 90) + (12 + 70) + (0 if share else 20 + 12)
    assert pack.num_tokens == prompts + (6 + 9 + 6) + (3 + 4 + 3)
    separate = 26**2 + 29**2 + 96**2 + 15**2 + 16**2 + 73**2
    assert pack.squares == separate - (20**2 + 12**2 if share else 0)
    groups = topology.initialize(config.parallel, seed=1)
    try:
        chunks = load_model(resolve_model(config.model, config.parallel), groups, chunk_tokens=1024)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            run_schedule(chunks, [pack], logprob_report(groups), groups, forward_only=True)
    finally:
        topology.destroy(groups)
    products = counter.get_total_flops()
    architecture = read_architecture(model)
    wanted = forward_flops(architecture, pack.padded_tokens, pack.squares, int(pack.response_lengths_S.sum()))
    padding = padded_vocab_size(architecture.vocab_size, 1) / architecture.vocab_size
    assert products == pytest.approx(wanted.linear + wanted.head * padding, rel=1e-12)

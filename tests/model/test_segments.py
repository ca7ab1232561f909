"""Which keys each query sees, against the definition pair by pair; gathered keys; FLOPs by torch's counter."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

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
from megatron_solopo.model.attention import gather_keys
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.model.segments import Segments, plan_segments
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
        found |= seen(plan_segments(pack.blocks, size, rank), held, gathered)
    assert found == defined(pack)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from(ROLE_SETS), st.sampled_from([1, 2, 4]))
def test_at_most_twice_the_bytes_are_gathered_that_unshared_prompts_need(lengths, roles, size: int) -> None:
    """Keys and values that one layer's attention keeps. Under CP, the unshared path gathers them as well."""
    for rank in range(size):
        kept = []
        for share in (True, False):
            pack = make_pack(lengths, roles, size, share)
            segments = plan_segments(pack.blocks, size, rank)
            keys = [torch.zeros(pack.padded_tokens, 2, 4, requires_grad=True) for _ in range(2)]
            gathered = gather_keys(*keys, segments, SimpleNamespace(size=lambda: 1))
            kept.append(saved_bytes(lambda given=gathered: given[0] * given[1]))
        ours, theirs = kept
        assert ours <= 2 * theirs


def saved_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Bytes of the tensors that autograd keeps."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.sampled_from(ROLE_SETS), st.sampled_from([1, 2, 4]), st.sampled_from(["float64", "bfloat16"]))
def test_gradients_of_all_copies_of_a_key_are_added_in_fp32(lengths, roles, size: int, precision: str) -> None:
    """Against torch's own gather, in float64."""
    dtype = getattr(torch, precision)
    pack = make_pack(lengths, roles, size, share=True)
    segments = plan_segments(pack.blocks, size, size - 1)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(pack.padded_tokens, 2, 3, generator=generator).to(dtype) for _ in range(2))
    assert segments.keys_K is not None
    found, gradients = [], []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (key, value)]
        copies = gather_keys(*leaves, segments, SimpleNamespace(size=lambda: 1))
        assert all(torch.equal(copy, x[segments.keys_K]) for copy, x in zip(copies, (key, value), strict=True))
        generator.manual_seed(1)
        gradients = [torch.randn(copy.shape, generator=generator).to(dtype) for copy in copies]
        torch.autograd.backward(copies, gradients)
        found.append([leaf.grad for leaf in leaves])
    for ours, again, gradient in zip(*found, gradients, strict=True):
        assert torch.equal(ours, again)
        exact = torch.zeros(key.shape, dtype=torch.float64).index_add(0, segments.keys_K, gradient.double())
        # bfloat16 rounds once, by 2^-9 of the sum; its sum of three gradients rounds twice.
        torch.testing.assert_close(ours.double(), exact, rtol=2**-8 if dtype is torch.bfloat16 else 1e-12, atol=1e-6)


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

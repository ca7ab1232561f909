"""Hugging Face tensors become Megatron parameters and come back, bit by bit, under any tensor parallelism."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.architecture.layout import padded_vocab_size
from megatron_solopo.checkpoint.mapping import Rule, canonical_name, rules, to_megatron
from tests.conversions import join_shards
from tests.parity.plain import published
from tests.tiny_models import FAMILIES, VOCAB_SIZE

TENSOR_PARALLEL = (1, 2, 4)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Architecture, dict]:
    """An architecture and weights of that family, every number another one."""
    path: Path = tmp_path_factory.mktemp("model")
    FAMILIES[request.param].save_pretrained(path)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param])
    count, weights = 0, {}
    for name, parameter in model.named_parameters():
        weights[name] = torch.arange(count, count + parameter.numel()).view(parameter.shape)
        count += parameter.numel()
    return read_architecture(path), published(weights, model.config.model_type)


def shards(rule: Rule, architecture: Architecture, weights: dict[str, Tensor], size: int) -> list[Tensor]:
    padded = padded_vocab_size(architecture.vocab_size, size)

    def read(name: str, index: tuple[slice, ...]) -> Tensor:
        return weights[name][index]

    return [to_megatron(rule, architecture, read, rank=r, size=size, padded_vocab=padded) for r in range(size)]


def test_the_table_names_every_weight_once(family) -> None:
    architecture, weights = family
    named = [name for rule in rules(architecture).values() for name in rule.huggingface]
    assert sorted(named) == sorted(weights)


@pytest.mark.parametrize("size", TENSOR_PARALLEL)
def test_there_and_back_is_bitwise_the_same(family, size: int) -> None:
    architecture, weights = family
    for rule in rules(architecture).values():
        parts = shards(rule, architecture, weights, size)
        assert len({part.shape for part in parts}) == 1, "equal shares"
        back = join_shards(rule, architecture, parts)
        assert list(back) == list(rule.huggingface)
        for name, tensor in back.items():
            assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("size", TENSOR_PARALLEL)
def test_no_weight_is_lost_or_doubled(family, size: int) -> None:
    architecture, weights = family
    for rule in rules(architecture).values():
        parts = shards(rule, architecture, weights, size)
        parts = parts[:1] if rule.shard_dim is None else parts
        held = torch.cat([part.flatten() for part in parts])
        own = torch.cat([weights[name].flatten() for name in rule.huggingface])
        padding = len(held) - len(own)
        expected = torch.cat([own, torch.zeros(padding, dtype=own.dtype)]).sort().values
        assert torch.equal(held.sort().values, expected), rule.megatron
        assert (padding == 0) is (rule.fusion != "vocab"), rule.megatron


@pytest.mark.parametrize("size", TENSOR_PARALLEL)
def test_a_rank_reads_its_own_share_alone(family, size: int) -> None:
    """But where tensor-parallel ranks share a key-value group, which is fused whole."""
    architecture, weights = family
    for rule in rules(architecture).values():
        read = 0

        def count(name: str, index: tuple[slice, ...]) -> Tensor:
            nonlocal read
            read += weights[name][index].numel()
            return weights[name][index]

        for rank in range(size):
            to_megatron(rule, architecture, count, rank=rank, size=size, padded_vocab=512)
        shared = size // architecture.num_query_groups if rule.fusion == "qkv" else 1
        copies = size if rule.shard_dim is None else max(shared, 1)
        assert read == copies * sum(weights[name].numel() for name in rule.huggingface), rule.megatron


def test_qkv_lies_group_by_group(family) -> None:
    """Per key-value head: its query heads, its key head, its value head, as Megatron-Core splits them."""
    architecture, weights = family
    rule = rules(architecture)["decoder.layers.1.self_attention.linear_qkv.weight"]
    (found,) = shards(rule, architecture, weights, 1)
    query, key, value = (weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    heads_per_group = architecture.num_attention_heads // architecture.num_query_groups

    def head(tensor: Tensor, number: int) -> Tensor:
        return tensor[number * architecture.head_dim : (number + 1) * architecture.head_dim]

    expected = []
    for group in range(architecture.num_query_groups):
        expected += [head(query, group * heads_per_group + place) for place in range(heads_per_group)]
        expected += [head(key, group), head(value, group)]
    assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize("size", TENSOR_PARALLEL)
def test_each_rank_holds_matching_shares_of_gate_and_up(family, size: int) -> None:
    architecture, weights = family
    gated = [rule for rule in rules(architecture).values() if rule.fusion == "gate_up"]
    assert len(gated) >= architecture.num_layers
    for rule in gated:
        gate, up = (weights[name] for name in rule.huggingface)
        columns = len(gate) // size
        for rank, part in enumerate(shards(rule, architecture, weights, size)):
            own = slice(rank * columns, (rank + 1) * columns)
            assert torch.equal(part, torch.cat([gate[own], up[own]]))


def test_the_vocabulary_is_padded_with_zeros(family) -> None:
    architecture, weights = family
    rule = rules(architecture)["embedding.word_embeddings.weight"]
    whole = torch.cat(shards(rule, architecture, weights, 4))
    assert len(whole) == 512 and whole[VOCAB_SIZE:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.weight"),
        ("mlp.linear_fc1.weight", "mlp.linear_fc1.weight"),
    ],
)
def test_transformer_engines_fused_norms_have_a_name_in_the_table(family, name: str, expected: str) -> None:
    architecture, _ = family
    assert canonical_name(f"decoder.layers.3.{name}") == f"decoder.layers.3.{expected}"
    if not architecture.has_experts(3):
        assert canonical_name(f"decoder.layers.3.{name}") in rules(architecture)


@pytest.mark.parametrize("name", ["mlp.experts.local_experts.2.linear_fc1.weight", "mlp.experts.linear_fc1.weight2"])
def test_experts_are_counted_over_all_ranks(name: str) -> None:
    found = canonical_name(f"decoder.layers.1.{name}", first_expert=8)
    assert found == "decoder.layers.1.mlp.experts.local_experts.10.linear_fc1.weight"

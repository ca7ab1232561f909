"""Divergences between contexts: which tokens are compared, where they lie, and what is kept in memory."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_solopo.config import ObjectiveConfig
from megatron_solopo.data.packing import Pack, build_pack
from megatron_solopo.model.divergence import exchange_teachers, plan_token_alignment, reverse_kl
from megatron_solopo.model.head import label_logprobs
from megatron_solopo.parallel.context import shard_indices
from megatron_solopo.parallel.topology import Topology
from tests.model.test_label_logprobs import LiveLogits
from tests.parity.layouts import tokenized
from tests.ranks import layout

ROLES = ObjectiveConfig().roles.all
ROWS = [
    {"id": "a", "prompt_short": [1], "prompt_long": list(range(15)), "chosen": [7], "rejected": [8]},
    {"id": "b", "prompt_short": [1] * 9, "prompt_long": [2] * 40, "chosen": list(range(50, 58)), "rejected": [3, 4]},
    {"id": "c", "prompt_short": [5] * 3, "prompt_long": [6] * 22, "chosen": [60, 61, 62], "rejected": [9] * 11},
]


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Topology]:
    with layout() as groups:
        yield groups


def a_pack(size: int, share_prompts: bool) -> Pack:
    rows = [tokenized(row, number) for number, row in enumerate(ROWS)]
    return build_pack(rows, ROLES, 2 * size, share_prompts=share_prompts)


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_student_and_its_teacher_predict_the_same_token(size: int, share_prompts: bool) -> None:
    pack = a_pack(size, share_prompts)
    owners_T = torch.empty_like(pack.tokens_T)
    for rank in range(size):
        owners_T[shard_indices(pack.cu_seqlens_B1, size, rank)] = rank
    owners_N = owners_T[pack.response_rows_N]
    plans = [plan_token_alignment(pack, owners_N, size, rank, lambda tensor: tensor) for rank in range(size)]
    labels = [pack.response_labels_N[owners_N == rank] for rank in range(size)]
    names = [pack.response_sequences_N[owners_N == rank] for rank in range(size)]
    assert len({len(plan.sent_rows) for plan in plans}) == 1

    def sent(values: list[Tensor]) -> Tensor:
        return torch.cat(
            [
                own[plan.sent_rows] if len(own) else torch.zeros_like(plan.sent_rows)
                for own, plan in zip(values, plans, strict=True)
            ]
        )

    compared = []
    for plan, own, sequences in zip(plans, labels, names, strict=True):
        assert torch.equal(own[plan.student_rows_K], sent(labels)[plan.teachers_K])
        roles = [ROLES[each % len(ROLES)] for each in sequences[plan.student_rows_K].tolist()]
        teachers = [ROLES[each % len(ROLES)] for each in sent(names)[plan.teachers_K].tolist()]
        assert set(roles) <= {"long_chosen"} and set(teachers) <= {"short_chosen"}
        assert plan.host_rows == tuple(plan.student_rows_K.tolist()) == tuple(sorted(plan.host_rows))
        compared += own[plan.student_rows_K].tolist()
    assert sorted(compared) == sorted(token for row in ROWS for token in row["chosen"])


def test_the_divergence_and_its_gradient_are_those_of_the_definition(one_rank: Topology) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(5, 12, generator=generator) for _ in range(2))
    teacher[0, 3] = -400.0  # a token that the teacher rules out
    for logits in (student, teacher):
        logits[:, 10:] = -torch.inf
    leaf = student.clone().requires_grad_()
    p, q = leaf[:, :10].log_softmax(dim=-1), teacher[:, :10].log_softmax(dim=-1)
    expected = (p.exp() * (p - q)).sum(dim=-1)
    expected.sum().backward()
    found, gradient = reverse_kl(student.clone(), teacher.clone(), 10, one_rank.tensor_group)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(gradient, leaf.grad)
    same, none = reverse_kl(student.clone(), student.clone(), 10, one_rank.tensor_group)
    assert torch.equal(same, torch.zeros(5)) and not none.any()


def test_live_logits_depend_on_the_chunk_alone(one_rank: Topology) -> None:
    """At most four copies of a chunk's logits, however long the answers are."""

    def peak(length: int, chunk_tokens: int) -> int:
        row = {"prompt_short": [1], "prompt_long": [1, 2], "chosen": [5] * length, "rejected": [6]}
        pack = build_pack([tokenized({"id": "a"} | row, 0)], ROLES, 2, share_prompts=False)
        rows = len(pack.response_rows_N)
        plan = plan_token_alignment(pack, torch.zeros(rows, dtype=torch.int64), 1, 0, lambda tensor: tensor)
        hidden, weight = torch.randn(rows, 12, requires_grad=True), torch.randn(256, 12, requires_grad=True)
        options: dict[str, Any] = {"vocab_size": 131, "chunk_tokens": chunk_tokens, "reduce_hidden_gradient": False}
        with LiveLogits(width=256) as logits:
            found = label_logprobs(
                hidden,
                weight,
                pack.response_labels_N,
                tensor_group=one_rank.tensor_group,
                teachers=(plan, exchange_teachers(hidden, plan, one_rank.context_group)),
                **options,
            )
            assert found.shape == (2, rows) and int((found[1] > 0).sum()) == length
            found.sum().backward()
        return logits.peak

    assert peak(20, 4) == peak(60, 4) <= 4 * 4

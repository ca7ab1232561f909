"""Greedy generation by our model under every layout that it takes equals transformers', token by token."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_solopo.config import ParallelConfig
from megatron_solopo.evaluate.megatron_model import MegatronModel, share_time
from megatron_solopo.generate.model import Answer, Answered, Request
from megatron_solopo.generate.transformers import EncodedRequest, TransformersModel, answer_of
from tests.distributed import run_distributed
from tests.layouts import ep, pp, tp
from tests.ranks import layout, two_ranks
from tests.tiny_models import VOCAB_SIZE, make_model

FAMILIES = ("qwen2_yarn", "qwen3", "llama3_tied", "qwen2_moe")
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": False},
    "pp2": {"pipeline_model_parallel_size": 2},
}
LENGTHS, NEW = (17, 40), 24
DECISIVE, DECISIVE_MOE = "decisive", "decisive_moe"
# Layouts whose data-parallel ranks share experts and answer questions of their own; and those that share none.
SHARING: dict[int, dict[str, dict[str, Any]]] = {
    2: {"ep2": ep(2), "ep2-within-tp2": ep(2, **tp(2), expert_tensor_parallel_size=1)},
    4: {
        "ep4": ep(4),
        "ep2-tp2": ep(2, **tp(2)),
        "ep4-tp2": ep(4, **tp(2), expert_tensor_parallel_size=1),
        "ep2-pp2": ep(2, **pp(2)),
    },
}
# Numbers closer than this are equal but for rounding, in fp32 with logits of about 1 (their differences: 2e-6).
TIE = 2e-5
CPU = torch.device("cpu")
NO_TOKENIZER: Any = SimpleNamespace(eos_token_id=None, decode=lambda tokens: " ".join(map(str, tokens)))


def make(path: Path, name: str) -> Path:
    """A random model; decisive ones have an output layer 20 times as large, so that rounding never decides."""
    make_model(path, {DECISIVE: "llama3", DECISIVE_MOE: "qwen2_moe"}.get(name, name))
    file = path / "model.safetensors"
    if name in (DECISIVE, DECISIVE_MOE) and file.is_file():
        tensors = load_file(file)
        tensors["lm_head.weight"] *= 20
        save_file(tensors, file, metadata={"format": "pt"})
    return path


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB_SIZE, (3, length), generator=generator) for length in LENGTHS]


class ModelOfNumbers(MegatronModel):
    """Its prompts are token ids with spaces between them."""

    def encode(self, requests: Sequence[Request]) -> list[EncodedRequest]:
        return [(each, [int(number) for number in str(each.prompt).split()]) for each in requests]


def load(name: str, folder: str, groups: Any, **sizes: Any) -> ModelOfNumbers:
    # transformers saves on rank 0 alone.
    shared = [str(make(Path(folder) / "model", name))]
    dist.broadcast_object_list(shared, src=0)
    parallel = ParallelConfig(**{"sequence_parallel": False} | sizes)
    return ModelOfNumbers(Path(shared[0]), NO_TOKENIZER, "float32", parallel, groups)


def generate(name: str, groups: Any, **sizes: Any) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        model = load(name, folder, groups, **sizes)
        generated = [model.generate(prompt, NEW, end_tokens=()) for prompt in prompts()]
        dist.barrier()
        return generated


def answer_unequally(world_size: int) -> dict[str, dict[str, Answer]]:
    """Answers to `unequal_batches`, which rank 0 keeps, under each layout whose ranks share experts."""
    found: dict[str, dict[str, Answer]] = {}
    questions: list[Any] = [unequal_batches() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(questions, src=0)
    ends, batches = questions[0]
    for key, sizes in SHARING[world_size].items():
        with layout(**sizes) as groups, tempfile.TemporaryDirectory() as folder:
            model = load(DECISIVE_MOE, folder, groups, **sizes)
            model._end_tokens = ends
            kept = found.setdefault(key, {})

            def keep(request: Request, answers: Sequence[Answer], seconds: float, kept: Any = kept) -> None:
                kept[request.question_id] = answers[0]

            model.answer(batches, lambda item: item, keep, lambda *refused: None)
            dist.barrier()
    return found


def unequal_batches() -> tuple[set[int], list[list[Request]]]:
    """End tokens and batches. Rows end at other places or never; there are fewer batches than whole rounds of ranks."""
    (short, long), _ = theirs(DECISIVE_MOE)
    ends = {int(short[0, 3]), int(long[1, 9])}
    asked = [
        (0, slice(0, 3), NEW),
        (1, slice(0, 2), NEW),
        (0, slice(1, 2), 5),
        (1, slice(0, 0), NEW),
        (1, slice(2, 3), 9),
    ]
    return ends, [
        [
            Request(f"{number}-{row}", " ".join(map(str, ids)), (0,), max_tokens)
            for row, ids in enumerate(prompts()[which][rows].tolist())
        ]
        for number, (which, rows, max_tokens) in enumerate(asked)
    ]


def on_two_ranks() -> dict[str, Any]:
    """By layout and model."""
    found: dict[str, Any] = {"unequal": answer_unequally(2)}
    for key, sizes in LAYOUTS.items():
        with layout(**sizes) as groups:
            found[key] = {name: generate(name, groups, **sizes) for name in (*FAMILIES, DECISIVE)}
    return found


@functools.cache
def theirs(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """transformers' tokens [B, n], and how far the best logit lies above the next at each of them."""
    with tempfile.TemporaryDirectory() as folder:
        model = TransformersModel(make(Path(folder) / "model", name), NO_TOKENIZER, CPU, "float32")
        tokens = [model.generate(prompt, NEW, end_tokens=()) for prompt in prompts()]
        margins = []
        for prompt, new in zip(prompts(), tokens, strict=True):
            with torch.no_grad():
                logits = model._model(torch.cat([prompt, new], dim=1)).logits[:, prompt.shape[1] - 1 : -1]
            best = logits.topk(2).values
            margins.append(best[..., 0] - best[..., 1])
        return tokens, margins


def check(name: str, ours: list[Tensor]) -> None:
    """Equal up to the first tie of each row, behind which the texts are others; ties must be rare."""
    tied = 0
    for mine, their, margins in zip(ours, *theirs(name), strict=True):
        assert mine.shape == their.shape == (3, NEW)
        for row, other, gaps in zip(mine, their, margins, strict=True):
            differing = (row != other).nonzero().flatten().tolist()
            if differing:
                assert gaps[differing[0]] < TIE, (name, differing[0], float(gaps[differing[0]]))
                tied += 1
    assert tied <= (0 if name == DECISIVE else 1), f"{tied} of 6 rows part at a tie"


@pytest.mark.parametrize("name", [*FAMILIES, pytest.param(DECISIVE, marks=pytest.mark.parity)])
def test_one_process_generates_what_transformers_does(name) -> None:
    with layout() as groups:
        check(name, generate(name, groups))


@pytest.mark.parametrize("name", [*FAMILIES, DECISIVE])
@pytest.mark.parametrize("key", LAYOUTS)
def test_parallel_ranks_generate_what_transformers_does(key, name) -> None:
    for rank in two_ranks(__name__):
        check(name, rank[key][name])


@pytest.mark.parity
@pytest.mark.parametrize("world_size", SHARING)
def test_ranks_that_share_experts_answer_unequal_rows(world_size: int) -> None:
    """They must enter the layers of experts together, also where one has fewer rows, shorter answers or no rows."""
    first = two_ranks(__name__)[0]["unequal"] if world_size == 2 else run_distributed(answer_unequally, 4, 4)[0]
    ends, batches = unequal_batches()
    expected = {}
    with tempfile.TemporaryDirectory() as folder:
        model = TransformersModel(make(Path(folder) / "model", DECISIVE_MOE), NO_TOKENIZER, CPU, "float32")
        for request in (each for batch in batches for each in batch):
            prompt = torch.tensor([[int(number) for number in str(request.prompt).split()]])
            (row,) = model.generate(prompt, request.max_tokens, ends).tolist()
            expected[request.question_id] = answer_of(row, NO_TOKENIZER, ends)
    lengths = {answer.tokens for answer in expected.values()}
    assert len(lengths) > 3 and NEW in lengths
    assert first == dict.fromkeys(SHARING[world_size], expected)


def test_decisive_models_are_decisive() -> None:
    for name in (DECISIVE, DECISIVE_MOE):
        assert min(float(margins.min()) for margins in theirs(name)[1]) > 0.01


def test_rows_end_where_transformers_ends_them(tmp_path) -> None:
    """End tokens that come at different places, or never; it stops once all rows have ended."""
    (free, _), _ = theirs(DECISIVE)
    ends = {int(free[0, 3]), int(free[1, 9])}
    path = make(tmp_path / "model", DECISIVE)
    with layout() as groups:
        ours = MegatronModel(path, NO_TOKENIZER, "float32", ParallelConfig(), groups)
        other = TransformersModel(path, NO_TOKENIZER, CPU, "float32")
        for chosen in (ends, {int(free[0, 3])}):
            rows = [
                [answer_of(row, NO_TOKENIZER, chosen) for row in model.generate(prompts()[0], NEW, chosen).tolist()]
                for model in (ours, other)
            ]
            assert rows[0] == rows[1] and rows[0][0].finish_reason == "stop" and rows[0][0].tokens <= 4
        assert ours.generate(prompts()[0][:1], NEW, ends).shape[1] == rows[0][0].tokens


def test_data_parallel_ranks_share_the_time_of_the_slowest() -> None:
    def answered(seconds: float) -> Answered:
        return Request("q", "", (0,), 1), [Answer("", "stop", 1)], seconds

    shared = share_time([[answered(1.0), answered(1.0)], [answered(3.0)], []])
    assert [seconds for _, _, seconds in shared] == [1.0, 1.0, 1.0]

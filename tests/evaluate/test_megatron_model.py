"""Greedy generation by our model under tensor, pipeline and data parallelism equals transformers', token by token."""

import functools
import tempfile
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
from megatron_solopo.generate.transformers import TransformersModel, answer_of
from tests.ranks import layout, two_ranks
from tests.tiny_models import VOCAB_SIZE, make_model

FAMILIES = ("qwen2_yarn", "qwen3", "llama3_tied", "qwen2_moe")
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": False},
    "pp2": {"pipeline_model_parallel_size": 2},
}
LENGTHS, NEW = (17, 40), 24
DECISIVE = "decisive"
# Numbers closer than this are equal but for rounding, in fp32 with logits of about 1 (their differences: 2e-6).
TIE = 2e-5
CPU = torch.device("cpu")
NO_TOKENIZER: Any = SimpleNamespace(eos_token_id=None, decode=lambda tokens: " ".join(map(str, tokens)))


def make(path: Path, name: str) -> Path:
    """A random model; `decisive` has an output layer 20 times as large, so that rounding never decides."""
    make_model(path, "llama3" if name == DECISIVE else name)
    file = path / "model.safetensors"
    if name == DECISIVE and file.is_file():
        tensors = load_file(file)
        tensors["lm_head.weight"] *= 20
        save_file(tensors, file, metadata={"format": "pt"})
    return path


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB_SIZE, (3, length), generator=generator) for length in LENGTHS]


def generate(name: str, groups, **sizes: Any) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        # transformers saves on rank 0 alone.
        shared = [str(make(Path(folder) / "model", name))]
        dist.broadcast_object_list(shared, src=0)
        parallel = ParallelConfig(**{"sequence_parallel": False} | sizes)
        model = MegatronModel(Path(shared[0]), NO_TOKENIZER, "float32", parallel, groups)
        generated = [model.generate(prompt, NEW, end_tokens=()) for prompt in prompts()]
        dist.barrier()
        return generated


def on_two_ranks() -> dict[str, dict[str, list[Tensor]]]:
    """By layout and model."""
    found = {}
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


def test_the_decisive_model_is_decisive() -> None:
    assert min(float(margins.min()) for margins in theirs(DECISIVE)[1]) > 0.01


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

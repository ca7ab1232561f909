"""What generates answers, greedily: the interface of a model, and how its tokens become an answer."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_solopo.data.encode import encode_prompt, template_of
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.evaluate.samples import Sample, Spec
from megatron_solopo.generate.journal import StoredResponse


@dataclass(frozen=True)
class Answer:
    """One generated answer: its text without the end token, and the tokens it took, with it."""

    text: str
    tokens: int
    finish_reason: str | None
    """stop: an end token came; length: the room was used up; others as a server says."""


class Generated(StoredResponse):
    """An answer as it is kept on the disk; `question_id` is the sample's id, `index` is 0."""

    answers: list[str]
    """The right ones."""
    tokens: int
    seconds: float
    """The sample's share of the wall time."""


MakeSample = Callable[[Spec], Sample | None]
"""Makes a sample's prompt; None where there is none of its length."""
Keep = Callable[[Sequence[Generated]], None]
"""Called with answers as they come, on the one process that writes."""


class Generator(Protocol):
    """Generates for many samples; what comes first is kept first."""

    device: str
    layout: dict[str, int]
    """Parallel sizes, empty where there are none."""

    def run(self, batches: Sequence[Sequence[Spec]], build: MakeSample, keep: Keep) -> None:
        """Answer every sample that can be made. The prompts of a batch are equally long and have the same room."""


class LocalModel(Protocol):
    """A model of this process or of this group of ranks."""

    def greedy(self, prompts_BT: Tensor, max_new_tokens: int, ends: Collection[int]) -> Tensor:
        """int64 [B, n], the most likely next tokens, n at most `max_new_tokens`; less where every row has an end.

        What follows a row's end token is anything.
        """


def batched(specs: Iterable[Spec], size: int) -> list[list[Spec]]:
    """Neighbours of equal length and room together, up to `size`: without padding, every row is exact."""
    batches: list[list[Spec]] = []
    for spec in specs:
        last = batches[-1] if batches else []
        like = last and (last[0].prompt_tokens, last[0].max_new_tokens) == (spec.prompt_tokens, spec.max_new_tokens)
        if like and len(last) < size:
            last.append(spec)
        else:
            batches.append([spec])
    return batches


def built(specs: Iterable[Spec], build: MakeSample) -> list[Sample]:
    """The samples that can be made."""
    return [sample for sample in map(build, specs) if sample is not None]


def generate_batch(
    model: LocalModel, samples: Sequence[Sample], tokenizer: Tokenizer, ends: Collection[int], device: torch.device
) -> list[Generated]:
    """Answers to one batch."""
    if not samples:
        return []
    ids = [encode_prompt(sample.prompt, tokenizer, template_of(sample.prompt)) for sample in samples]
    assert all(len(prompt) == samples[0].spec.prompt_tokens for prompt in ids)
    start = time.perf_counter()
    rows = model.greedy(torch.tensor(ids, device=device), samples[0].spec.max_new_tokens, ends).tolist()
    seconds = (time.perf_counter() - start) / len(samples)
    answers = [answer_of(row, tokenizer, ends) for row in rows]
    return [generated(sample, answer, seconds) for sample, answer in zip(samples, answers, strict=True)]


def generated(sample: Sample, answer: Answer, seconds: float) -> Generated:
    """The record of an answer."""
    return Generated(
        question_id=sample.spec.id,
        index=0,
        text=answer.text,
        finish_reason=answer.finish_reason,
        answers=list(sample.answers),
        tokens=answer.tokens,
        seconds=seconds,
    )


def answer_of(tokens: Sequence[int], tokenizer: Tokenizer, ends: Collection[int]) -> Answer:
    """An answer from a row of generated tokens."""
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    count = len(tokens) if end is None else end + 1
    return Answer(tokenizer.decode(tokens[:end]), count, "length" if end is None else "stop")

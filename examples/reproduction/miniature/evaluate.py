"""Accuracy against context length, of a Hugging Face model, by greedy answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from miniature.task import END_ID, WORDS, draw_facts, num_facts, place_facts, questions, text

LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
QUESTION_WORDS = 2
"""What follows the context: `ask k07`."""
_BATCH_TOKENS = 16384


@dataclass(frozen=True)
class EvalSet:
    """Questions on contexts of one length."""

    prompts: torch.Tensor
    """[B, T + 2]"""
    answers: torch.Tensor
    """[B]"""


def eval_set(length: int, count: int, seed: int) -> EvalSet:
    """`count` questions on contexts of `length` words, the same for the same arguments."""
    rng = np.random.default_rng([seed, length])
    contexts = place_facts(rng, *draw_facts(rng, count, num_facts(length)), length)
    prompts, answers = questions(contexts, rng.integers(num_facts(length), size=count))
    return EvalSet(torch.from_numpy(prompts), torch.from_numpy(answers))


def question_rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """The questions of `eval_set` for all `LENGTHS`, as rows that `evaluate long-context` reads."""
    for length in LENGTHS:
        examples = eval_set(length, count, seed)
        for place, (prompt, answer) in enumerate(zip(examples.prompts, examples.answers, strict=True)):
            yield {
                "id": f"{length}-{place}",
                "prompt_long": text(prompt.tolist()),
                "answers": [WORDS[answer]],
                "response_tokens": 2,
            }


@torch.inference_mode()
def right(model: Any, examples: EvalSet) -> torch.Tensor:
    """Which greedy answers are the right word and then the end, bool [B].

    One pass over prompt and right answer tells: greedy decoding gives just these two tokens if each is the likeliest
    after all before it.
    """
    sequences = torch.cat([examples.prompts, examples.answers[:, None]], dim=1)
    found = []
    for rows in sequences.split(max(1, _BATCH_TOKENS // sequences.shape[1])):
        likeliest = model(rows, logits_to_keep=2).logits.argmax(dim=-1)
        found.append((likeliest[:, 0] == rows[:, -1]) & (likeliest[:, 1] == END_ID))
    return torch.cat(found)


def accuracy(model: Any, examples: EvalSet) -> float:
    """Fraction of right answers."""
    return right(model, examples).float().mean().item()

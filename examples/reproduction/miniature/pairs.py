"""Preference pairs from the base model's own answers to short contexts: the data commands, called in process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_solopo.data.settings import PrepareSettings
from megatron_solopo.data.tokenize import prepare
from megatron_solopo.files import atomic_path
from megatron_solopo.triplets.context_rows import to_line
from megatron_solopo.triplets.sample import sample
from megatron_solopo.triplets.select import select
from megatron_solopo.triplets.settings import SampleSettings, SelectSettings
from miniature.task import LONG_FACTS, SHORT_FACTS, WORDS, draw_facts, place_facts, questions, text

SHORT_LENGTH = 16
_SAMPLES = 16
_ANSWER_TOKENS = 2
"""The word and the end."""


def make_pairs(
    base: Path,
    folder: Path,
    *,
    long_length: int,
    num_questions: int,
    longs_per_question: int,
    temperature: float,
    seed: int,
) -> Path:
    """contexts -> `data sample` -> `data select` -> `data prepare`; returns the prepared directory.

    Several answers to each short context are drawn from `base`; a question with a right and a wrong one makes a pair.
    """
    contexts, responses, triplets = (folder / name for name in ("contexts.jsonl", "responses.jsonl", "triplets.jsonl"))
    write_contexts(contexts, num_questions, longs_per_question, long_length, seed)
    sample(
        SampleSettings(
            contexts=contexts,
            output=responses,
            model=str(base),
            num_samples=_SAMPLES,
            samples_per_request=_SAMPLES,
            max_tokens=_ANSWER_TOKENS,
            temperature=temperature,
            seed=seed,
        )
    )
    # Not sub_em: a weak model also answers with a whole fact (`k07=v21`), which contains the right word.
    select(
        SelectSettings(
            contexts=contexts,
            responses=responses,
            output=triplets,
            tokenizer=str(base),
            score="token_f1",
            seed=seed,
            overwrite=True,
        )
    )
    prepare(PrepareSettings(input=triplets, output=folder / "prepared", tokenizer=str(base), seed=seed, overwrite=True))
    return folder / "prepared"


def write_contexts(path: Path, count: int, longs: int, long_length: int, seed: int) -> None:
    """Rows as `data build` writes them: a short context, and `longs` long ones with its facts, more, and filler."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(map(to_line, _rows(count, longs, long_length, seed))), encoding="utf-8")


def _rows(count: int, longs: int, long_length: int, seed: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    keys, values = draw_facts(rng, count, LONG_FACTS)
    asked = rng.integers(SHORT_FACTS, size=count)
    short = place_facts(rng, keys[:, :SHORT_FACTS], values[:, :SHORT_FACTS], SHORT_LENGTH)
    prompts_short, answers = questions(short, asked)
    long = [place_facts(rng, keys, values, long_length) for _ in range(longs)]
    prompts_long = [questions(each, asked)[0] for each in long]
    for row, column in np.ndindex(count, longs):
        prompt_long = prompts_long[column][row]
        yield {
            "id": f"q{row}-{column}",
            "question_id": f"q{row}",
            "prompt_short": text(prompts_short[row]),
            "prompt_long": text(prompt_long),
            "question": text(prompts_short[row, -2:]),
            "answers": [WORDS[answers[row]]],
            "evidence_depths": [float(long[column].places_BF[row, asked[row]] / (long_length - 1))],
            "response_tokens": _ANSWER_TOKENS,
        }

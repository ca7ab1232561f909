"""The long context's length, for tokenizers whose joined passages differ from the sum of the passages."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_solopo.data.contexts import Document, Pool, evidence_depths, long_documents, prompt, short_documents
from megatron_solopo.data.musique import Question

OVERHEAD = 20


def make_question(texts: Sequence[str], supporting: Sequence[int], answer: str = "Zagreb") -> Question:
    paragraphs = [
        {"idx": i, "title": f"T{i}", "paragraph_text": text, "is_supporting": i in supporting}
        for i, text in enumerate(texts)
    ]
    hops = [{"question": "Where?", "answer": answer, "paragraph_support_idx": supporting[0]}]
    return Question.model_validate(
        {"id": "q", "question": "Where?", "paragraphs": paragraphs, "question_decomposition": hops, "answer": answer}
    )


def count_words(text: str) -> int:
    return len(text.split())


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=3, max_size=25),
    joint=st.sampled_from([-2, -1, 0, 1, 4]),
    room=st.integers(0, 300),
    seed=st.integers(0, 99),
)
def test_length_is_exact_whatever_a_joint_costs(sizes, joint, room, seed) -> None:
    texts = [" ".join([f"w{i}"] * size) for i, size in enumerate(sizes)]
    texts[0] += " Zagreb"
    question = make_question(texts, supporting=[0])
    pool = Pool([question], count_words)
    short = pool.find(question.evidence)

    def count(documents: Sequence[Document]) -> int:
        return OVERHEAD + sum(d.tokens for d in documents) + joint * (len(documents) - 1)

    limit = count(short) + room
    documents, length, exhausted = long_documents(question, short, pool, count, limit, np.random.default_rng(seed))
    unused = [d for d in pool.distractors if d not in documents]
    assert length == count(documents) <= limit
    assert len({d.key for d in documents}) == len(documents) and short[0] in documents
    assert exhausted == (not unused)
    assert joint > 0 or all(d.tokens > limit - length for d in unused)


def test_every_paragraph_is_tokenized_once() -> None:
    asked: list[str] = []
    shared = ["alpha one", "beta two", "gamma three"]
    questions = [make_question(shared, [0]), make_question([*shared, "delta four"], [1])]
    pool = Pool(questions, lambda text: asked.append(text) or count_words(text))
    assert len(asked) == len(set(asked)) == len(pool.distractors) == 4


def test_same_text_under_two_titles_counts_as_one() -> None:
    question = make_question(["Zagreb is here", "same  TEXT", "Same text", "other"], [0])
    pool = Pool([question], count_words)
    assert [d.paragraph.title for d in pool.distractors] == ["T0", "T1", "T3"]
    short = short_documents(question, pool, 9, np.random.default_rng(0))
    assert sorted(d.paragraph.title for d in short)[:1] == ["T0"] and len(short) == 3


@pytest.mark.parametrize("leak", ["Old ZAGREB town", "in \uff3a\uff21\uff27\uff32\uff25\uff22", "zagreb's"])
def test_a_distractor_with_the_answer_in_any_writing_is_excluded(leak) -> None:
    question = make_question(["Zagreb is here", leak, "other"], [0])
    pool = Pool([question], count_words)
    rng = np.random.default_rng(0)
    assert len(short_documents(question, pool, 9, rng)) == 2
    documents, _, _ = long_documents(question, pool.find(question.evidence), pool, len, 99, rng)
    assert leak not in prompt(documents, question)


def test_depth_is_the_middle_of_the_passage() -> None:
    question = make_question(["w " * 8 + "Zagreb", "x " * 18 + "end", "y " * 8 + "end"], [0, 2])
    documents = Pool([question], count_words).distractors
    assert [d.tokens for d in documents] == [11, 21, 11]  # "Title: T0" is two words
    assert evidence_depths(documents, question) == [round(5.5 / 43, 4), round(37.5 / 43, 4)]

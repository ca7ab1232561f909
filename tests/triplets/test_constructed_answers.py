"""How hops become sentences, and what may stand in for the answer."""

import numpy as np
import pytest

from megatron_solopo.triplets.constructed_answers import GIVE_UP, GIVE_UP_SHARE, chosen_response, rejected_response
from megatron_solopo.triplets.corpus.formats import MusiqueRecord, Question, golds, mentions, normalise

PASSAGES = {
    "Tamworth Manifesto": "Robert Peel issued it in 1834.",
    "Peel family": "His father was Sir Robert Peel, 1st Baronet.",
    "Walcha (town)": "Walcha was gazetted in 1878 and had 1,451 people in 2016.",
}


def make_question(hops: list[tuple[str, str]], aliases: list[str] | None = None) -> Question:
    record = MusiqueRecord.model_validate(
        {
            "id": "q",
            "question": "?",
            "paragraphs": [
                {"idx": i, "title": title, "paragraph_text": text, "is_supporting": i < 2}
                for i, (title, text) in enumerate(PASSAGES.items())
            ],
            "question_decomposition": [
                {"question": question, "answer": answer, "paragraph_support_idx": i}
                for i, (question, answer) in enumerate(hops)
            ],
            "answer": hops[-1][1],
            "answer_aliases": aliases or [],
        }
    )
    return record.to_question()


def rejected_forms(question: Question) -> list[str]:
    return [rejected_response(question, question.documents, np.random.default_rng(seed)) for seed in range(200)]


def test_chosen_resolves_references_and_relations() -> None:
    question = make_question(
        [("who Issued the Tamworth manifesto", "Robert Peel"), ("#1 >> father", "Sir Robert Peel, 1st Baronet")]
    )
    assert chosen_response(question) == (
        'According to "Tamworth Manifesto", the answer to "Who Issued the Tamworth manifesto?" is Robert Peel. '
        'According to "Peel family", the father of Robert Peel is Sir Robert Peel, 1st Baronet. '
        "So the answer is: Sir Robert Peel, 1st Baronet."
    )


@pytest.mark.parametrize(
    ("hop", "statement"),
    [
        ("#1 >> place of birth", "the place of birth of Ann is X"),
        ("#1 >> member of political party", "Ann is a member of the political party X"),
        ("#1 >> located in the administrative territorial entity", "Ann is located in X"),
        ("#1 >> owned by", "Ann is owned by X"),
        ("#1 >> educated at", "Ann is educated at X"),
        ("Duchy of #1 >> shares border with", "Duchy of Ann shares a border with X"),
        ("What is #1 's Book called ?", 'the answer to "What is Ann\'s Book called?" is X'),
        ("Name one bridge in #1 .", 'the answer to "Name one bridge in Ann." is X'),
        ("who sang the #3 hit of #1", 'the answer to "Who sang the #3 hit of Ann?" is X'),
    ],
)
def test_hops_read_as_sentences(hop, statement) -> None:
    chosen = chosen_response(make_question([("who", "Ann"), (hop, "X")]))
    assert chosen.split('According to "Peel family", ')[1] == f"{statement}. So the answer is: X."


def test_an_answer_that_ends_in_a_period_gets_no_second_one() -> None:
    assert chosen_response(make_question([("who", "Acme Inc.")])).endswith("is Acme Inc. So the answer is: Acme Inc.")


def test_rejected_ends_in_a_title_and_gives_up_as_often_as_stated() -> None:
    question = make_question([("who", "Robert Peel"), ("#1 >> father", "Sir Robert Peel, 1st Baronet")])
    forms = rejected_forms(question)
    endings = {form.rpartition("So the answer is: ")[2] for form in forms if form != GIVE_UP}
    # "Robert Peel" is the question's own subject, and part of the gold answer.
    assert endings == {"Tamworth Manifesto.", "Peel family.", "Walcha."}
    assert abs(forms.count(GIVE_UP) / len(forms) - GIVE_UP_SHARE) < 0.08


def test_another_hops_answer_can_be_the_wrong_one() -> None:
    question = make_question([("who", "Robert Peel"), ("where", "Walcha Road"), ("#2 >> country", "Australia")])
    endings = {form.rpartition("So the answer is: ")[2] for form in rejected_forms(question)}
    assert "Robert Peel." in endings and "Walcha Road." not in endings


def test_a_number_is_replaced_by_a_number_as_long() -> None:
    endings = {f.rpartition("So the answer is: ")[2] for f in rejected_forms(make_question([("when", "1834")]))}
    assert endings - {GIVE_UP} == {"1878.", "2016."}


def test_gives_up_where_every_wrong_chain_mentions_the_answer() -> None:
    question = make_question([("who leads", "Ann"), ("#1 >> party", "Democrats")], aliases=["lead"])
    assert set(rejected_forms(question)) == {GIVE_UP}


@pytest.mark.parametrize("aliases", [[], ["peel"], ["1878"], ["tamworth"]])
def test_no_form_of_the_answer_is_in_a_rejected_one(aliases) -> None:
    question = make_question([("when", "1834")], aliases)
    assert not any(mentions(normalise(form), golds(question.answers)) for form in rejected_forms(question))

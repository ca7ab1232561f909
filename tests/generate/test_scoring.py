"""Scores against examples worked by hand from the definitions of SQuAD, RULER and LongBench."""

import pytest

from megatron_solopo.generate.scoring import (
    SCORERS,
    exact_match,
    final_answer,
    squad_normalise,
    string_match_all,
    string_match_part,
    sub_em,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel-Tower, Paris!", "eiffeltower paris"),
        ("  An apple\n a day ", "apple day"),
        ("U.S.", "us"),
        ("theatre another", "theatre another"),
        ("Ann's", "anns"),
        ("the", ""),
        ("\u201cquoted\u201d", "\u201cquoted\u201d"),  # ASCII punctuation alone, as in evaluate-v1.1.py
    ],
)
def test_squad_normalisation(text, normal) -> None:
    assert squad_normalise(text) == normal


@pytest.mark.parametrize(
    ("response", "answers", "scores"),
    [
        # exact_match, sub_em, string_match_part, string_match_all, token_f1
        ("It is Paris.", ["Paris", "City of Light"], (0, 1, 1, 0.5, 2 * (1 / 3) * 1 / (1 / 3 + 1))),
        ("the Eiffel Tower", ["Eiffel Tower."], (1, 1, 0, 0, 1)),
        ("EIFFEL tower", ["Eiffel Tower"], (1, 1, 1, 1, 1)),
        ("London", ["Paris"], (0, 0, 0, 0, 0)),
        ("12 and 34", ["12", "34", "56"], (0, 1, 1, 2 / 3, 0.5)),
        ("in the year 1834", ["1834"], (0, 1, 1, 1, 0.5)),
        ("", ["Paris"], (0, 0, 0, 0, 0)),
        ("the U.S. and Canada", ["US"], (0, 1, 0, 0, 0.5)),
        ("cat cat dog", ["cat dog dog"], (0, 0, 0, 0, 2 / 3)),
    ],
)
def test_worked_examples(response, answers, scores) -> None:
    names = ("exact_match", "sub_em", "string_match_part", "string_match_all", "token_f1")
    found = [SCORERS[name](response, answers) for name in names]
    assert found == pytest.approx(scores)


def test_aliases_are_not_averaged_but_by_string_match_all() -> None:
    """lm-evaluation-harness scores 0.33 where RULER's QA gives 1."""
    answers = ["Denver Broncos", "Broncos", "The Denver team"]
    assert string_match_part("I say Denver Broncos", answers) == sub_em("I say Denver Broncos", answers) == 1
    assert string_match_all("I say Denver Broncos", answers) == pytest.approx(2 / 3)
    assert token_f1("Broncos", answers) == 1


def test_an_answer_of_articles_and_punctuation_is_not_in_everything() -> None:
    assert sub_em("Vitamin C", ["A"]) == 0
    assert sub_em(" a ", ["A"]) == 1


def test_exact_match_takes_the_best_answer() -> None:
    assert exact_match("The Denver Broncos!", ["Broncos", "denver broncos"]) == 1
    assert exact_match("Denver Broncos won", ["Broncos", "denver broncos"]) == 0


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("First, the answer is: no. So THE ANSWER IS: Turin.", ("Turin.", True)),
        ("Turin", ("Turin", False)),
        ("The answer is:", ("", True)),
        ("\u0130\u0130, the Answer is: Turin", ("Turin", True)),  # lower case is longer
    ],
)
def test_the_final_answer_stands_behind_the_last_marker(response, found) -> None:
    assert final_answer(response, "answer is:") == found

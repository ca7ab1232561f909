"""From responses to triplets: what is chosen, what is counted, what is refused."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_solopo.data.rows import validate_file
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.generate.journal import StoredResponse
from megatron_solopo.triplets.context_rows import ContextFile, ContextRow, prompts_hash
from megatron_solopo.triplets.prompt import Measure
from megatron_solopo.triplets.select import Judge, SelectReport, select
from megatron_solopo.triplets.settings import SelectSettings
from tests.triplets.context_files import context, response, write_lines
from tests.triplets.musique_example import Row, read

RIGHT = [
    "It is in France. So the answer is: Paris.",
    "So the answer is: Paris.",
    "France? The answer is: Paris, France.",
]
WRONG = ["So the answer is: Rome.", "It is in Italy, not Paris. So the answer is: Rome.", "I do not know it."]


class Bench:
    """Contexts and responses in a folder, and the selection from them."""

    def __init__(self, folder: Path, tokenizer: str) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.contexts = [context(0)]
        self.responses = [response(0, index, text) for index, text in enumerate(RIGHT + WRONG)]

    def select(self, **changes) -> tuple[list[Row], SelectReport]:
        contexts = write_lines(self.folder / "contexts.jsonl", self.contexts)
        responses = write_lines(self.folder / "responses.jsonl", self.responses)
        output = self.folder / "triplets.jsonl"
        report = select(
            SelectSettings(
                contexts=contexts,
                responses=responses,
                output=output,
                tokenizer=self.tokenizer,
                overwrite=True,
                **changes,
            )
        )
        assert validate_file(output).errors == []
        return read(output), report


@pytest.fixture
def bench(tmp_path, tokenizer_path) -> Bench:
    return Bench(tmp_path, tokenizer_path)


def test_the_shortest_right_answer_and_a_wrong_one(bench) -> None:
    (row,), report = bench.select()
    assert row["chosen"] == RIGHT[1] and row["rejected"] in WRONG
    assert {name: row[name] for name in ("id", "prompt_short", "prompt_long")} == {
        "id": "q0",
        "prompt_short": "short 0",
        "prompt_long": "long 0 and some more",
    }
    assert row["score"] == "sub_em" and row["scores"] == [1.0, 0.0] and row["samples"][0] == 1
    assert (report.questions, report.questions_with_pairs, report.triplets_written) == (1, 1, 1)
    assert (report.responses, report.responses_right, report.responses_without_marker) == (6, 3, 1)


def test_the_whole_text_may_be_scored(bench) -> None:
    _, final = bench.select()
    _, whole = bench.select(scored_text="whole")
    assert (final.responses_right, whole.responses_right) == (3, 4)
    _, other = bench.select(answer_marker="the answer IS:")
    assert other.responses_without_marker == 1
    _, unmarked = bench.select(answer_marker="Final:")
    assert (unmarked.responses_right, unmarked.responses_without_marker) == (4, 6)


@pytest.mark.parametrize(
    ("score", "threshold", "right"),
    [("sub_em", 1.0, 3), ("string_match_part", 1.0, 3), ("token_f1", 1.0, 2), ("token_f1", 0.6, 3)],
)
def test_scores_decide_what_is_right(score, threshold, right, bench) -> None:
    assert bench.select(score=score, threshold=threshold)[1].responses_right == right


def test_string_match_all_asks_for_every_answer(bench) -> None:
    bench.contexts = [context(0, answers=["Paris", "France"])]
    (row,), report = bench.select(score="string_match_all")
    assert row["chosen"] == RIGHT[2] and report.responses_right == 1


def drawn(tokenizer, texts: list[str], answers: list[str], **changes) -> Counter:
    """Which pairs come of 200 seeds."""
    path = Path("unused.jsonl")
    judge = Judge(SelectSettings(contexts=path, responses=path, output=path, tokenizer="", **changes))
    row = ContextRow.model_validate(context(0, answers=answers))
    responses = [StoredResponse(**response(0, index, text)) for index, text in enumerate(texts)]
    candidates, _ = judge.candidates(responses, row, Measure(tokenizer, "plain"))
    right, wrong = judge.divide(candidates)
    pairs = (next(judge.pairs(right, wrong, np.random.default_rng(seed))) for seed in range(200))
    return Counter((pair.chosen.text, pair.rejected.text) for pair in pairs)


def test_policies(tokenizer) -> None:
    random = drawn(tokenizer, RIGHT + WRONG, ["Paris"], chosen="random")
    assert len(random) == 9 and max(random.values()) < 45
    best = drawn(tokenizer, RIGHT + WRONG, ["Paris"], chosen="highest_f1", rejected="nearest_length")
    # Both answers that are "Paris" alone have the highest F1; which one is a draw.
    assert {chosen for chosen, _ in best} == {RIGHT[0], RIGHT[1]}
    lengths = {text: len(tokenizer.encode_continuation(text)) + 1 for text in RIGHT + WRONG}
    for chosen, rejected in best:
        ratios = {text: max(lengths[text] / lengths[chosen], lengths[chosen] / lengths[text]) for text in WRONG}
        assert ratios[rejected] == min(ratios.values())
    texts = [*RIGHT, *WRONG, "So the answer is: Paris town."]
    near = drawn(tokenizer, texts, ["Paris town"], rejected="highest_f1")
    assert set(near) == {(texts[-1], RIGHT[0]), (texts[-1], RIGHT[1])}


def test_ties_are_counted_only_where_the_policy_left_a_choice(bench) -> None:
    assert bench.select()[1].questions_tied == 0
    assert bench.select(chosen="highest_f1")[1].questions_tied == 1
    assert bench.select(chosen="random")[1].questions_tied == 0


def test_several_pairs_share_no_response_and_every_length_gets_them(bench) -> None:
    bench.contexts = [context(0, suffix="@1"), context(0, suffix="@2")]
    rows, report = bench.select(max_pairs_per_question=2)
    assert [row["id"] for row in rows] == ["q0@1#0", "q0@2#0", "q0@1#1", "q0@2#1"]
    assert rows[0]["chosen"] == rows[1]["chosen"] != rows[2]["chosen"] == rows[3]["chosen"]
    assert rows[0]["rejected"] != rows[2]["rejected"]
    assert (report.questions, report.triplets_written) == (1, 4)
    rows, _ = bench.select(max_pairs_per_question=9)
    assert len(rows) == 6 and len({row["rejected"] for row in rows}) == 3


def test_the_length_ratio_is_kept_or_the_question_counted(bench, tokenizer) -> None:
    lengths = {text: len(tokenizer.encode_continuation(text)) + 1 for text in RIGHT + WRONG}
    for seed in range(4):
        (row,), report = bench.select(seed=seed, min_length_ratio=0.8, max_length_ratio=1.25)
        ratio = lengths[row["chosen"]] / lengths[row["rejected"]]
        assert 0.8 <= ratio <= 1.25 and report.mean_length_ratio == pytest.approx(ratio)
    bench.contexts.append(context(1))
    bench.responses += [response(1, 0, "So the answer is: Paris."), response(1, 1, "No. " * 30)]
    _, report = bench.select(min_length_ratio=0.8, max_length_ratio=1.25)
    assert report.questions_without_pair == {"no pair within the length ratio": 1}


def test_questions_without_a_pair_are_counted_by_reason(bench) -> None:
    bench.contexts += [context(number) for number in range(1, 5)]
    bench.responses += [response(1, i, text) for i, text in enumerate(RIGHT)]
    bench.responses += [response(2, i, text) for i, text in enumerate(WRONG)]
    bench.responses += [response(3, 0, " "), response(9, 0, "to nobody")]
    rows, report = bench.select()
    assert [row["id"] for row in rows] == ["q0"]
    assert report.questions_without_pair == {
        "every response is right": 1,
        "every response is wrong": 1,
        "no response that can be used": 1,
        "no response": 1,
    }
    assert report.responses_to_other_questions == 1
    assert all(f"without, {reason}: 1" in str(report) for reason in report.questions_without_pair)


def test_responses_that_cannot_be_trained_on_are_counted_and_never_used(bench, tokenizer) -> None:
    fits = "So the answer is: Paris" + "!" * 40
    room = len(tokenizer.encode_continuation(fits)) + 1
    long = fits + " And more words."
    bench.contexts = [context(0, response_tokens=room)]
    texts = [fits, long, "So the answer is: Paris. I", "", WRONG[0], f" {WRONG[0]}\n"]
    bench.responses = [response(0, index, text) for index, text in enumerate(texts)]
    bench.responses[2]["finish_reason"] = "length"
    (row,), report = bench.select()
    assert (row["chosen"], row["rejected"]) == (fits, WRONG[0])
    assert report.excluded == {
        "longer than the room that the contexts leave": 1,
        "cut at --max-tokens": 1,
        "empty": 1,
        "the same as another": 1,
    }


def test_chat_prompts_get_chat_responses_and_are_measured_so(bench) -> None:
    tokenizer = load_tokenizer(bench.tokenizer)
    # The template's <|im_end|> and line break, where plain text has one end token.
    needed = len(tokenizer.encode_continuation(RIGHT[1])) + 2
    for room, kept in ((needed, 1), (needed - 1, 0)):
        bench.contexts = [context(0, chat=True, response_tokens=room)]
        bench.responses = [response(0, 0, RIGHT[1]), response(0, 1, "Rome")]
        if kept:
            (row,), _ = bench.select()
            assert row["chosen"] == [{"role": "assistant", "content": RIGHT[1]}]
        else:
            with pytest.raises(UserError, match="longer than the room that the contexts leave: 1"):
                bench.select()


def test_the_report_is_beside_the_triplets(bench) -> None:
    _, report = bench.select()
    written = json.loads((bench.folder / "triplets.report" / "report.json").read_text())
    assert written["triplets_written"] == report.triplets_written == 1
    made = written["provenance"]
    assert made["tokenizer"]["fingerprint"] == load_tokenizer(bench.tokenizer).fingerprint
    assert len(made["inputs"]) == 2 and len(made["output"]) == 1 and made["settings"]["score"] == "sub_em"
    page = (bench.folder / "triplets.report" / "index.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 7 and "http" not in page.split("<table>")[0]


def test_the_same_seed_makes_the_same_bytes(bench) -> None:
    bench.select(chosen="random")
    first = (bench.folder / "triplets.jsonl").read_bytes()
    bench.responses.reverse()
    bench.select(chosen="random")
    assert (bench.folder / "triplets.jsonl").read_bytes() == first


def test_short_prompts_are_the_same_however_many_long_ones_are_beside_them(tmp_path) -> None:
    one, two = (
        ContextFile(
            write_lines(
                tmp_path / f"{len(lengths)}.jsonl", [context(n, suffix=each) for n in (0, 1) for each in lengths]
            )
        )
        for lengths in (("@1",), ("@2", "@3"))
    )
    assert prompts_hash(one, "short") == prompts_hash(two, "short")
    assert prompts_hash(one, "long") != prompts_hash(two, "long")


@pytest.mark.parametrize("side", ["short", "long"])
def test_responses_fit_other_contexts_of_the_other_side_alone(side, bench) -> None:
    asked = ContextFile(write_lines(bench.folder / "asked.jsonl", [context(0)]))
    bench.responses.insert(0, {"journal": {"side": side, "prompts": prompts_hash(asked, side)}})
    other = {"short": "long", "long": "short"}[side]
    bench.contexts = [context(0) | {f"prompt_{other}": "another one"}]
    (row,), _ = bench.select()
    assert row[f"prompt_{other}"] == "another one" and row[f"prompt_{side}"] == context(0)[f"prompt_{side}"]
    for changed in (
        {f"prompt_{side}": "another one"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"id": "q1", "question_id": "q1"},
    ):
        bench.contexts = [context(0) | changed]
        with pytest.raises(UserError, match=f"were sampled from other {side} contexts"):
            bench.select()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 0.0}, "--threshold 0.0"),
        ({"max_pairs_per_question": 0}, "--max-pairs-per-question 0"),
        ({"min_length_ratio": -1.0}, "--min-length-ratio -1.0"),
        ({"min_length_ratio": 2.0, "max_length_ratio": 0.5}, "must not be above"),
        ({"answer_marker": " "}, "must not be blank"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_a_mistake_is_one_line(changes, message, bench) -> None:
    with pytest.raises(UserError) as error:
        bench.select(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (bench.folder / "triplets.jsonl").exists()


def test_files_that_are_not_what_they_should_be_are_named_by_line(bench) -> None:
    bench.contexts.append({"id": "x"})
    with pytest.raises(UserError, match=r"contexts\.jsonl:2: question_id is required"):
        bench.select()
    bench.contexts = [context(0), context(1), context(0)]
    with pytest.raises(UserError, match="do not stand together"):
        bench.select()
    bench.contexts, bench.responses = [context(0)], [{"question_id": "q0"}]
    with pytest.raises(UserError, match=r"responses\.jsonl:1: index is required"):
        bench.select()
    assert not (bench.folder / "triplets.jsonl").exists()

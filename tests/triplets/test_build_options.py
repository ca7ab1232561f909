"""What the options of `data build` change, each on a few questions."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.triplets.build import BuildReport, build
from megatron_solopo.triplets.corpus.formats import entity_golds, mentions, normalise
from megatron_solopo.triplets.prompt import Measure
from megatron_solopo.triplets.settings import BuildSettings
from tests.triplets.context_files import write_lines
from tests.triplets.musique_example import Row, evidence, first_lines, passage, passages, read, write


class Bench:
    """Contexts of the first questions."""

    def __init__(self, folder: Path, tokenizer: str) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.source = write(folder / "few.jsonl", first_lines(30))

    def build(self, **options) -> tuple[list[Row], BuildReport]:
        options = {"long_tokens": "4096", "response_tokens": 300, "overwrite": True} | options
        output = self.folder / "contexts.jsonl"
        report = build(BuildSettings(input=self.source, output=output, tokenizer=self.tokenizer, **options))
        return read(output), report


@pytest.fixture
def bench(tmp_path, tokenizer_path) -> Bench:
    return Bench(tmp_path, tokenizer_path)


def check_lengths(rows: list[Row], tokenizer: Tokenizer, template: str, room: int) -> None:
    measure = Measure(tokenizer, template)
    for row in rows:
        assert row["response_tokens"] == room
        assert measure.prompt(row["prompt_long"]) + room == row["long_tokens"] <= row["target_tokens"]
        assert measure.prompt(row["prompt_short"]) + room == row["short_tokens"]
        assert row["long_tokens"] > 0.99 * row["target_tokens"] - 1


def test_room_is_left_for_responses_to_come(bench, tokenizer) -> None:
    rows, report = bench.build()
    assert len(rows) == report.rows_written == 30 and "chosen" not in rows[0]
    check_lengths(rows, tokenizer, "plain", 300)


def test_the_chat_template_is_measured(bench, tokenizer) -> None:
    rows, _ = bench.build(template="chat")
    check_lengths(rows, tokenizer, "chat", 300)
    text = tokenizer.render_chat(rows[0]["prompt_long"], add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) + 300 == rows[0]["long_tokens"] and [m["role"] for m in rows[0]["prompt_long"]] == ["user"]


def test_a_tokenizer_without_a_chat_template_is_refused(bench, sentencepiece) -> None:
    bench.tokenizer = sentencepiece
    with pytest.raises(UserError, match="has no chat template"):
        bench.build(template="chat")


def test_a_sentencepiece_model_is_measured_exactly(bench, sentencepiece) -> None:
    from megatron_solopo.data.tokenizer import load_tokenizer

    bench.tokenizer = sentencepiece
    rows, _ = bench.build(long_tokens="8192")
    assert len(rows) > 20
    check_lengths(rows, load_tokenizer(sentencepiece), "plain", 300)


def test_the_short_context_is_filled_to_a_length(bench, tokenizer, questions) -> None:
    rows, report = bench.build(short_tokens=1500)
    check_lengths(rows, tokenizer, "plain", 300)
    for row in rows:
        assert 0.99 * 1500 - 1 < row["short_tokens"] <= 1500
        assert evidence(questions[row["id"]]) <= set(passages(row["prompt_short"])) <= set(passages(row["prompt_long"]))
    # A question's own documents come first: they fill 1,200 tokens but for the end.
    own = [
        len(set(passages(row["prompt_short"])) & {passage(d) for d in questions[row["id"]].documents})
        / len(passages(row["prompt_short"]))
        for row in rows
    ]
    assert sum(own) / len(own) > 0.6 and report.rows_written > 25


def test_evidence_that_alone_exceeds_the_short_length_is_named_with_its_line(bench) -> None:
    rows, report = bench.build(short_tokens=700)
    whole, _ = bench.build(short_distractors=0)
    ids = [json.loads(line)["id"] for line in bench.source.read_text().splitlines()]
    too_long = {(row["id"], ids.index(row["id"]) + 1) for row in whole if row["short_tokens"] > 700}
    reason = "the evidence alone exceeds --short-tokens"
    assert too_long and {(e["id"], e["line"]) for e in report.left_out if e["reason"] == reason} == too_long
    assert not {row["id"] for row in rows} & {id for id, _ in too_long}


def test_documents_may_keep_the_order_of_the_corpus_with_the_evidence_scattered(bench, questions) -> None:
    rows, report = bench.build(document_order="corpus", short_distractors=4)
    order = {}
    for line in bench.source.read_text().splitlines():
        for paragraph in json.loads(line)["paragraphs"]:
            order.setdefault(f"Title: {paragraph['title']}\n{paragraph['paragraph_text'].strip()}", len(order))
    for row in rows:
        supporting = evidence(questions[row["id"]])
        short = [order[each] for each in passages(row["prompt_short"])]
        others = [order[each] for each in passages(row["prompt_long"]) if each not in supporting]
        assert short == sorted(short) and others == sorted(others) and len(others) > 10
        first_of_all = [order[each] for each in passages(row["prompt_long"]) if each in supporting]
        assert first_of_all == sorted(first_of_all)
    assert report.depth.distance < report.depth.critical


def test_titles_may_be_left_out(bench, questions) -> None:
    rows, _ = bench.build(titles=False)
    for row in rows:
        texts = {questions[row["id"]].documents[index].text for index in questions[row["id"]].supporting}
        assert texts <= set(passages(row["prompt_long"])) and "Title: " not in row["prompt_long"]


def test_a_prompt_template_of_the_users(bench, tokenizer, questions) -> None:
    template = (
        "{% for document in documents %}[{{ loop.index }}] {{ document.text }}\n{% endfor %}Q: {{ question }}\nA:"
    )
    path = bench.folder / "mine.jinja"
    path.write_text(template)
    rows, report = bench.build(prompt_template=path)
    check_lengths(rows, tokenizer, "plain", 300)
    assert rows[0]["prompt_long"].startswith("[1] ") and rows[0]["prompt_long"].endswith(
        f"Q: {rows[0]['question']}\nA:"
    )
    assert set(report.provenance["inputs"]) == {str(bench.source), str(path)}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "not a usable Jinja template"),
        ("{{ documents[0].text }} {{ question }}", "must write each of `documents` once"),
        ("{% for d in documents %}{{ d.text }}{{ d.text }}{% endfor %}{{ question }}", "`documents` once"),
        ("{% for d in documents %}{{ d.text }}{% endfor %}", "must write each of `question` once"),
        ("{{ question.__class__.__mro__ }}", "not a usable Jinja template"),
        ("{{ nothing }}", "not a usable Jinja template"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(template, message, bench) -> None:
    path = bench.folder / "mine.jinja"
    path.write_text(template)
    with pytest.raises(UserError, match=message) as error:
        bench.build(prompt_template=path)
    assert "\n" not in str(error.value) and not (bench.folder / "contexts.jsonl").exists()


def test_lengths_may_be_drawn(bench, tokenizer) -> None:
    rows, _ = bench.build(long_tokens="loguniform:3000-9000")
    check_lengths(rows, tokenizer, "plain", 300)
    targets = [row["target_tokens"] for row in rows]
    assert len(set(targets)) > 20 and 3000 <= min(targets) < 4500 and 6000 < max(targets) <= 9000
    rows, _ = bench.build(long_tokens="3000:1,5000:1")
    assert {row["target_tokens"] for row in rows} == {3000, 5000} and len(rows) == 30


def test_a_pool_of_more_documents_is_drawn_from(bench) -> None:
    bench.source = write(bench.folder / "few.jsonl", first_lines(2))
    extra = [{"title": f"Extra {n}", "text": f"Sentence {n} of the extra pool. " * (2 + n % 9)} for n in range(400)]
    rows, report = bench.build(pool=write_lines(bench.folder / "pool.jsonl", extra), long_tokens="16000")
    assert len(rows) == 2 and report.pool_documents > 420
    assert all(row["prompt_long"].count("Title: Extra") > 100 for row in rows)
    write_lines(bench.folder / "pool.jsonl", [{"title": "no text"}])
    with pytest.raises(UserError, match=r"pool\.jsonl:1: text: Field required"):
        bench.build(pool=bench.folder / "pool.jsonl")


def test_the_leak_rule_decides_which_distractors_are_excluded(bench, questions) -> None:
    def leaking(rows: list[Row]) -> int:
        found = 0
        for row in rows:
            question = questions[row["id"]]
            shown = (p for p in passages(row["prompt_long"]) if p not in evidence(question))
            found += any(mentions(normalise(p), entity_golds(question.answers)) for p in shown)
        return found

    counts = {rule: leaking(bench.build(leak_rule=rule, long_tokens="32000")[0]) for rule in ("substring", "allow")}
    assert counts["substring"] == 0 < counts["allow"]


def test_yes_and_no_are_not_searched_for(bench) -> None:
    rows = [json.loads(line) for line in bench.source.read_text().splitlines()]
    rows[0] |= {"answer": "yes", "answer_aliases": []}
    bench.source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    built, report = bench.build()
    assert built[0]["answers"] == ["yes"] and report.rows_without_leak_check == 1
    assert "rows with yes or no for an answer, not searched for in distractors: 1" in str(report)


def test_every_stage_says_what_made_it(bench) -> None:
    _, report = bench.build(seed=3)
    folder = bench.folder / "contexts.report"
    written = json.loads((folder / "report.json").read_text())
    made = written["provenance"]
    assert made["seed"] == 3 and len(made["inputs"][str(bench.source)]) == 64
    assert made["output"].keys() == {str(bench.folder / "contexts.jsonl")} and made["settings"]["long_tokens"] == "4096"
    assert made["tokenizer"]["path"] == bench.tokenizer and made["command"]
    assert written["long_tokens"]["maximum"] == report.long_tokens.maximum
    page = (folder / "index.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4 and str(report).splitlines()[0] in page
    assert {path.name for path in folder.iterdir()} == {"report.json", "index.html"}


def test_a_chat_template_that_refuses_is_told_in_one_line_on_any_number_of_processes(bench, tmp_path) -> None:
    made = AutoTokenizer.from_pretrained(bench.tokenizer)
    made.chat_template = "{{ raise_exception('no user messages here') }}"
    made.save_pretrained(tmp_path / "refusing")
    bench.tokenizer = str(tmp_path / "refusing")
    for num_proc in (1, 2):
        with pytest.raises(UserError, match="no user messages here") as error:
            bench.build(template="chat", num_proc=num_proc)
        assert "\n" not in str(error.value)

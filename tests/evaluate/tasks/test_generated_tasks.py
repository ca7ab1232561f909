"""Generated prompts: exact lengths under every tokenizer, answers where they should lie, one prompt per seed."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_solopo.data.rendering import encode_prompt
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.tasks.generated_tasks import TASKS, GeneratedTasks, TaskSettings
from megatron_solopo.evaluate.tasks.question_corpus import QuestionCorpus
from megatron_solopo.evaluate.tasks.synthetic_samples import read_sentences
from megatron_solopo.evaluation_settings import TASK_NAMES
from megatron_solopo.generate.scoring import SCORERS
from megatron_solopo.triplets.prompt import DEFAULT_TEMPLATE, Measure, PromptTemplate
from tests.triplets.musique_example import QUESTIONS, first_lines, write

STYLES = ("byte_level", "metaspace", "prepend", "identity", "nmt")
NEEDLES_AND_CHAINS = [name for name in TASKS if name not in ("qa", "common_words")]


@pytest.fixture(scope="module")
def corpus() -> QuestionCorpus:
    return QuestionCorpus(QUESTIONS, "musique", PromptTemplate(DEFAULT_TEMPLATE, titles=True, template="plain"), 0)


def tasks_of(tokenizer, names, lengths, template="plain", **options) -> GeneratedTasks:
    corpus, sentences = options.pop("corpus", None), options.pop("sentences", None)
    asked = TaskSettings(tuple(names), tuple(lengths), **{"depths": (0.0, 0.5, 1.0), "samples": 3, "seed": 0} | options)
    return GeneratedTasks(asked, Measure(tokenizer, template), template, sentences, corpus)


def samples_of(tasks: GeneratedTasks) -> list:
    return [tasks.build(spec) for spec in tasks.specs()]


def test_every_task_that_a_user_may_name_is_there() -> None:
    assert tuple(TASKS) == TASK_NAMES


@given(st.sampled_from(STYLES), st.sampled_from(NEEDLES_AND_CHAINS), st.integers(700, 3000), st.integers(0, 1 << 20))
@settings(max_examples=60)
def test_prompts_have_exactly_the_asked_length(tokenizers, style, task, length, seed) -> None:
    tokenizer = tokenizers[style]
    for template in ("plain", "chat") if tokenizer.chat_template else ("plain",):
        tasks = tasks_of(tokenizer, [task], [length], template, samples=1, seed=seed)
        (sample,) = samples_of(tasks)
        assert len(encode_prompt(sample.prompt, tokenizer, template)) == length == sample.spec.prompt_tokens


@pytest.mark.parametrize("style", STYLES)
def test_lists_and_questions_have_exactly_the_asked_length(tokenizers, style, corpus) -> None:
    lengths = (3501, 5120)
    tasks = tasks_of(tokenizers[style], ["common_words", "qa"], lengths, corpus=corpus, samples=2)
    for sample in samples_of(tasks):
        assert len(encode_prompt(sample.prompt, tokenizers[style], "plain")) == sample.spec.length


def test_a_prompt_depends_on_the_seed_and_its_number_alone(tokenizers) -> None:
    names, lengths = ["needle_multi_key", "common_words"], (1600, 1800)
    first, again, other = (
        samples_of(tasks_of(tokenizers["byte_level"], names, lengths, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert all(one.prompt != two.prompt for one, two in zip(first, other, strict=True))
    alone = tasks_of(tokenizers["byte_level"], names, lengths, seed=1)
    assert alone.build(alone.specs()[-1]) == first[-1]  # made without the others before it
    assert len({sample.prompt for sample in first}) == len(first)


def test_the_needle_lies_at_its_depth_and_is_asked_for(tokenizers) -> None:
    for sample in samples_of(tasks_of(tokenizers["byte_level"], ["needle_single", "needle_multi_key"], [3000])):
        key = re.search(r"give for the (\w+ \w+)\?", sample.prompt)[1]
        (code,) = sample.answers
        _, text, _, lead = sample.prompt.split("\n\n")
        needle = f"The access code for the {key} is {code}."
        assert text.count(needle) == 1 == sample.prompt.count(code)
        assert text.index(needle) / (len(text) - len(needle)) == pytest.approx(sample.spec.depth, abs=0.03)
        assert lead == f"Answer: The access code for the {key} is"
        codes = re.findall(r"\d{7}", text)
        assert len(set(codes)) == len(codes) == (1 if sample.spec.task == "needle_single" else 4)


@pytest.mark.parametrize(("task", "keys"), [("needle_multi_value", 1), ("needle_multi_query", 4)])
def test_several_codes_are_asked_for(tokenizers, task, keys) -> None:
    for sample in samples_of(tasks_of(tokenizers["byte_level"], [task], [2500])):
        given_codes = re.findall(r"The access code for the (\w+ \w+) is (\d{7})\.", sample.prompt)
        assert sample.spec.depth is None and len({key for key, _ in given_codes}) == keys
        assert Counter(code for _, code in given_codes) == Counter(sample.answers) and len(sample.answers) == 4


def test_a_chain_leads_from_the_value_to_every_variable(tokenizers) -> None:
    for sample in samples_of(tasks_of(tokenizers["byte_level"], ["variable_tracking"], [1500])):
        value = re.search(r"have the value (\d+)", sample.prompt)[1]
        held = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.prompt):
            held[name] = held.get(source, source)
        assert set(held) == set(sample.answers) and set(held.values()) == {value} and len(held) == 5


@pytest.mark.parametrize(("length", "often", "seldom"), [(3000, 10, 1), (9000, 30, 3)])
def test_common_words_are_the_most_common(tokenizers, length, often, seldom) -> None:
    (sample,) = samples_of(tasks_of(tokenizers["byte_level"], ["common_words"], [length], samples=1))
    counts = Counter(re.findall(r"\d+\. (\w+)", sample.prompt))
    assert {word for word, count in counts.items() if count == often} == set(sample.answers)
    assert set(counts.values()) == {often, seldom} and len(sample.answers) == 10
    assert SCORERS["string_match_all"](" ".join(sample.answers[:4]), sample.answers) == 0.4


def test_questions_keep_their_evidence_and_leak_no_answer(tokenizers, corpus) -> None:
    questions = {row["question"]: row for row in map(json.loads, QUESTIONS.read_text(encoding="utf-8").splitlines())}
    samples = samples_of(tasks_of(tokenizers["byte_level"], ["qa"], [8000], corpus=corpus))
    assert len({sample.prompt for sample in samples}) == 3
    for sample in samples:
        row = questions[re.search(r"Question: (.*)\n", sample.prompt)[1]]
        rest = sample.prompt
        for paragraph in row["paragraphs"]:
            if paragraph["is_supporting"]:
                assert rest.count(paragraph["paragraph_text"]) == 1
                rest = rest.replace(f"Title: {paragraph['title']}\n{paragraph['paragraph_text']}", "")
        documents = rest[: rest.rindex("Question: ")]
        assert not any(answer.lower() in documents.lower() for answer in sample.answers if len(answer) > 12)
        assert sample.spec.depth is None  # MuSiQue's evidence is several paragraphs


def test_a_text_file_is_a_haystack(tokenizers, tmp_path) -> None:
    file = tmp_path / "essay.txt"
    file.write_text("It began to rain. Nobody cared!\n\nWho would\nhave? The end.", encoding="utf-8")
    sentences = read_sentences(file)
    assert sentences == ["It began to rain.", "Nobody cared!", "Who would have?", "The end."]
    for sample in samples_of(tasks_of(tokenizers["prepend"], ["needle_single"], [900], sentences=sentences)):
        assert "Who would have? The end. It began to rain. Nobody cared!" in sample.prompt
        assert len(encode_prompt(sample.prompt, tokenizers["prepend"], "plain")) == 900


@pytest.mark.parametrize(
    ("names", "length", "options", "message"),
    [
        (["needle_single"], 50, {}, r"--lengths 50: needle_single: takes at least \d+ tokens"),
        (["common_words"], 300, {}, r"--lengths 300: common_words: takes at least \d+ tokens"),
        (["qa"], 4000, {}, "--tasks qa: needs --corpus"),
        (["qa"], 90_000, {"corpus": True}, r"--corpus holds too few documents, for \d+ tokens"),
        (["qa"], 4000, {"corpus": True, "samples": 500}, "--samples 500: --corpus holds only 4 questions"),
    ],
)
def test_what_cannot_be_made_is_refused(tokenizers, tmp_path, names, length, options, message) -> None:
    prompt = PromptTemplate(DEFAULT_TEMPLATE, titles=True, template="plain")
    corpus = QuestionCorpus(write(tmp_path / "few.jsonl", first_lines(4)), "musique", prompt, 0)
    chosen = options | ({"corpus": corpus} if options.get("corpus") else {})
    with pytest.raises(UserError, match=message):
        tasks_of(tokenizers["byte_level"], names, [length], **{"samples": 1} | chosen).check()


@pytest.mark.parametrize("style", STYLES)
def test_short_lists_meet_every_length(tokenizers, style) -> None:
    tokenizer = tokenizers[style]
    with pytest.raises(UserError, match="takes at least") as error:
        tasks_of(tokenizer, ["common_words"], [100], samples=1).check()
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    try:
        tasks_of(tokenizer, ["common_words"], [least + 1], samples=1).check()
    except UserError as unfit:  # a byte-level vocabulary may have no padding of a single token
        assert style == "byte_level" and str(unfit).endswith(f"; the next that can be met is {least + 2}")
    for sample in samples_of(tasks_of(tokenizer, ["common_words"], [least, *range(least + 2, least + 40)], samples=1)):
        assert len(encode_prompt(sample.prompt, tokenizer, "plain")) == sample.spec.length


def test_a_length_that_no_padding_meets_names_the_next(tokenizers) -> None:
    class Even(Measure):
        def prompt(self, prompt) -> int:
            return super().prompt(prompt) // 2 * 2

    asked = TaskSettings(("needle_single",), (901,), (0.5,), 1, 0)
    with pytest.raises(UserError, match=r"no padding meets this length; the next that can be met is 902$"):
        GeneratedTasks(asked, Even(tokenizers["byte_level"], "plain"), "plain").check()


def test_a_corpus_that_just_suffices_is_taken_whole(tokenizers, tmp_path) -> None:
    prompt = PromptTemplate(DEFAULT_TEMPLATE, titles=True, template="plain")
    corpus = QuestionCorpus(write(tmp_path / "few.jsonl", first_lines(4)), "musique", prompt, 0)
    tokenizer = tokenizers["byte_level"]
    with pytest.raises(UserError, match="too few documents") as error:
        tasks_of(tokenizer, ["qa"], [90_000], corpus=corpus, samples=1).check()
    length = int(re.search(r"for (\d+) tokens", str(error.value))[1])
    (sample,) = samples_of(tasks_of(tokenizer, ["qa"], [length], corpus=corpus, samples=1))
    assert len(encode_prompt(sample.prompt, tokenizer, "plain")) == length

import json
import shutil

import pytest

from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.data.tokenize_parts import Tokenization, tokenize_rows
from megatron_solopo.errors import UserError
from tests.data.sample_rows import as_messages, prepare, triplet, write_rows
from tests.data.tiny_tokenizers import (
    REWRITING,
    STRICT,
    write_hugging_face,
    write_incomplete_bpe,
    write_sentencepiece,
    write_unigram,
    write_word_level,
)


def refusal(tmp_path, rows, tokenizer, **options):
    """The message prepare refuses with; nothing but the input may be left behind."""
    (tmp_path / "refused").mkdir()
    path = write_rows(tmp_path / "refused" / "data.jsonl", rows)
    with pytest.raises(UserError) as caught:
        prepare(path, tmp_path / "refused" / "out", tokenizer, **options)
    assert [entry.name for entry in (tmp_path / "refused").iterdir()] == ["data.jsonl"]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_rows_are_refused_before_anything_is_written(tmp_path, hugging_face):
    message = refusal(tmp_path, [triplet(0), triplet(0), triplet(1) | {"chosen": ""}], hugging_face)
    path = tmp_path / "refused" / "data.jsonl"
    assert f"{path}: 2 errors, list them with: megatron-solopo data validate {path}" in message
    assert "'row-0' is already the id of line 1" in message and f"{path}:3: chosen: is empty" in message


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_length": 1}, "--max-length 1"),
        ({"eval_count": -1}, "--eval-count -1"),
        ({"eval_count": 2}, "--eval-count 2: leaves no rows for training, there are 2"),
        ({"num_proc": 0}, "--num-proc 0"),
        ({"max_length": 20, "overlong": "drop"}, "all 2 rows are longer than --max-length 20"),
        ({"max_length": 20, "num_proc": 2}, "2 of 2 rows are longer than --max-length 20"),
    ],
)
def test_refused_options(tmp_path, hugging_face, options, reason):
    assert reason in refusal(tmp_path, [triplet(0), triplet(1)], hugging_face, **options)


def test_messages_need_a_chat_template(tmp_path, sentencepiece, hugging_face):
    message = refusal(tmp_path, [as_messages(triplet(0))], sentencepiece)
    assert message.startswith(f"{sentencepiece}: has no chat template")
    shutil.rmtree(tmp_path / "refused")
    assert "--template plain cannot write" in refusal(
        tmp_path, [as_messages(triplet(0))], hugging_face, template="plain"
    )


def test_strings_and_messages_in_one_file(tmp_path, hugging_face):
    rows = [triplet(0), as_messages(triplet(1))]
    assert "pass --template chat" in refusal(tmp_path, rows, hugging_face)
    path = write_rows(tmp_path / "data.jsonl", rows)
    assert prepare(path, tmp_path / "out", hugging_face, template="chat").kept == 2


@pytest.mark.parametrize("num_proc", [1, 2])
def test_rows_that_the_template_refuses_are_named(tmp_path, num_proc):
    tokenizer = str(write_hugging_face(tmp_path / "strict", chat_template=STRICT))
    rows = [as_messages(triplet(i)) for i in range(4)]
    rows[2]["prompt_long"].insert(0, {"role": "system", "content": "be brief"})
    message = refusal(tmp_path, rows, tokenizer, num_proc=num_proc)
    assert "1 of 4 rows cannot be tokenized" in message
    assert "line 3: the chat template of " in message and "System role not supported" in message


def test_one_cause_in_many_rows_is_told_once_with_its_way_out(tmp_path):
    tokenizer = str(write_hugging_face(tmp_path / "strict", chat_template=STRICT))
    rows = [as_messages(triplet(i)) for i in range(8)]
    for each in rows[1:]:
        each["prompt_long"].insert(0, {"role": "system", "content": "be brief"})
    message = refusal(tmp_path, rows, tokenizer)
    assert "7 of 8 rows cannot be tokenized" in message and "lines 2, 3, 4, 5, 6, ...: the chat template" in message
    assert message.count("System role not supported") == 1
    assert message.endswith("write the system text into the first user message, or use another template")


def test_a_template_with_a_mistake_is_blamed_itself(tmp_path):
    tokenizer = str(write_hugging_face(tmp_path / "broken", chat_template="{% for m in messages %}{{ m.content }"))
    message = refusal(tmp_path, [as_messages(triplet(i)) for i in range(3)], tokenizer)
    assert f"the chat template of {tokenizer} is broken: " in message and "refuses" not in message


@pytest.mark.parametrize("kind", ["word level", "only tokenizer.json", "another name", "unigram", "sentencepiece"])
def test_unknown_words_of_an_answer_are_refused_and_those_of_a_prompt_are_counted(tmp_path, kind):
    rows = [triplet(i, long_words=5) for i in range(3)]
    if kind == "sentencepiece":
        tokenizer = str(write_sentencepiece(tmp_path / "t.model", byte_fallback=False))
    elif kind == "unigram":
        tokenizer = str(write_unigram(tmp_path / "pieces"))
    else:
        named = {"word level": {"unk_token": "<unk>"}, "another name": {"unk_token": "<s>"}}.get(kind, {})
        tokenizer = str(write_word_level(tmp_path / "words", rows, **named))
    bad = [*rows[:2], rows[2] | {"chosen": "\N{SNOWMAN}"}]
    message = refusal(tmp_path, bad, tokenizer)
    assert "has no token for text of an answer" in message and "row-2: chosen: '\N{SNOWMAN}' has the tokens" in message
    path = write_rows(tmp_path / "bad.jsonl", bad)
    effects = prepare(path, tmp_path / "warned", tokenizer, on_lost_content="warn").effects
    assert effects["unknown_in_answer"].rows == 1
    path = write_rows(tmp_path / "prompt.jsonl", [rows[0], rows[1] | {"prompt_long": "\N{SNOWMAN} is it?"}])
    effects = prepare(path, tmp_path / "prompt", tokenizer).effects
    assert effects["unknown_in_prompt"].rows == 1 and "unknown_in_answer" not in effects


@pytest.mark.parametrize("kind", ["characters", "bytes", "some of its bytes"])
def test_characters_without_a_token_are_refused_in_an_answer_and_counted_in_a_prompt(tmp_path, kind):
    """A BPE model without an unknown token leaves them out, and nothing in the tokens tells."""
    rows = [triplet(i, long_words=5) for i in range(3)]
    known = "".join(sorted({each for row in rows for text in row.values() for each in text}))
    known += "\N{CLOUD}" if kind == "some of its bytes" else ""  # two of the three bytes of a snowman
    path = write_incomplete_bpe(tmp_path / "bpe", bytes_known=None if kind == "characters" else known)
    bad = [*rows[:2], rows[2] | {"chosen": "so \N{SNOWMAN} it is"}]
    message = refusal(tmp_path, bad, str(path))
    assert "has no token for text of an answer" in message
    assert "row-2: chosen: 'so \N{SNOWMAN} it is' has no tokens for '\N{SNOWMAN}'" in message
    file = write_rows(tmp_path / "prompt.jsonl", [rows[0], rows[1] | {"prompt_long": "is it \N{SNOWMAN}?"}])
    effects = prepare(file, tmp_path / "prompt", str(path)).effects
    assert effects["unknown_in_prompt"].rows == 1 and "unknown_in_answer" not in effects


def test_answers_that_are_equal_since_their_words_are_unknown_name_the_words_once(tmp_path):
    rows = [triplet(i, long_words=5) for i in range(4)]
    tokenizer = str(write_word_level(tmp_path / "words", rows))
    unknown = ["\N{SNOWMAN}", "\N{UMBRELLA}", "\N{COMET}"]
    bad = [row | {"chosen": word, "rejected": word * 2} for row, word in zip(rows, unknown, strict=False)]
    message = refusal(tmp_path, [*bad, rows[3] | {"chosen": "row-3 row-3", "rejected": "row-3  row-3"}], tokenizer)
    assert (
        "lines 1, 2, 3: rejected: has the same tokens as chosen: the tokenizer has no token for text of an answer, "
        "which is trained as its unknown token or left out; chosen: '\N{SNOWMAN}' has the tokens '<unk>'; take that "
        "text out" in message
    )
    assert message.endswith("; line 4: rejected: has the same tokens as chosen") and "\N{COMET}" not in message


def test_a_key_that_is_there_twice_is_refused(tmp_path, hugging_face):
    text = json.dumps(triplet(0))
    path = tmp_path / "twice.jsonl"
    path.write_text(text[:-1] + ', "chosen": "another"}\n')
    for content in (path.read_text(), f"[{path.read_text()}]"):
        path.write_text(content)
        with pytest.raises(UserError, match="the key 'chosen' is there twice"):
            prepare(path, tmp_path / "out", hugging_face)


@pytest.mark.parametrize("name", ["tools", "chat_template_kwargs"])
def test_a_key_that_is_there_twice_in_text_of_a_row_is_refused(tmp_path, hugging_face, name):
    text = '[{"name": "w", "name": "v"}]' if name == "tools" else '{"lang": "en", "lang": "de"}'
    path = write_rows(tmp_path / "twice.jsonl", [triplet(0) | {name: text}])
    with pytest.raises(UserError, match=f"{name}: is text that is not valid JSON: the key '.*' is there twice"):
        prepare(path, tmp_path / "out", hugging_face)


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    tokenizer = str(write_hugging_face(tmp_path / "rewriting", chat_template=REWRITING))
    message = refusal(tmp_path, [as_messages(triplet(0))], tokenizer)
    assert f"by {tokenizer}: line 1: chosen: the chat template does not write prompt_short with an answer" in message


def test_existing_output(tmp_path, triplets, hugging_face):
    out = tmp_path / "out"
    prepare(triplets, out, hugging_face)
    with pytest.raises(UserError, match="already exists"):
        prepare(triplets, out, hugging_face, eval_count=1)
    assert load_prepared(out).manifest.eval == 0
    prepare(triplets, out, hugging_face, eval_count=1, overwrite=True)
    assert load_prepared(out).manifest.eval == 1
    precious = tmp_path / "home"
    precious.mkdir()
    with pytest.raises(UserError, match="not a prepared directory"):
        prepare(triplets, precious, hugging_face, overwrite=True)
    assert precious.is_dir()


def test_a_refused_overwrite_keeps_the_old_data(tmp_path, triplets, hugging_face):
    before = prepare(triplets, tmp_path / "out", hugging_face)
    with pytest.raises(UserError, match="longer than"):
        prepare(triplets, tmp_path / "out", hugging_face, max_length=10, overwrite=True)
    assert load_prepared(tmp_path / "out").manifest == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data.jsonl", "out"]


def test_an_interruption_leaves_nothing_but_a_hidden_folder_for_the_next_call(
    tmp_path, triplets, hugging_face, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("datasets.Dataset.save_to_disk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(triplets, tmp_path / "out", hugging_face)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".out.work", "data.jsonl"]
    monkeypatch.undo()
    prepare(triplets, tmp_path / "out", hugging_face)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data.jsonl", "out"]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_fault_of_the_calling_code_is_no_problem_of_a_row(num_proc, hugging_face, tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [triplet(number) for number in range(20)])
    pairs = Tokenization("pair", hugging_face, "", "plain", (), {})
    with pytest.raises(KeyError, match="prompt"):  # the rows are triplets, not pairs
        tokenize_rows(path, pairs, num_proc=num_proc, work=tmp_path / "work")

import json
import shutil

import numpy as np
import pytest
from datasets import disable_progress_bars

from megatron_solopo import __version__
from megatron_solopo.data.prepared import load_prepared, token_lengths
from megatron_solopo.data.template import tokenize_row
from megatron_solopo.data.tokenize import prepare
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.files import sha256_file, sha256_json
from tests.data.tiny_tokenizers import CHATML, REWRITING, STRICT, write_hugging_face, write_sentencepiece

disable_progress_bars()

TOKEN_COLUMNS = ("prompt_short", "prompt_long", "chosen", "rejected")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    return str(write_hugging_face(tmp_path_factory.mktemp("tokenizer") / "hf"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    return str(write_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "piece.model"))


def triplet(index, long_words=20):
    return {
        "id": f"row-{index}",
        "prompt_short": f"Where was author {index} born? Answer:",
        "prompt_long": "The river Po. " * long_words + f"Where was author {index} born? Answer:",
        "chosen": f" In Turin, {index}.",
        "rejected": " It cannot be told.",
    }


def as_messages(row):
    return {
        name: text
        if name == "id"
        else [{"role": "user" if name.startswith("prompt") else "assistant", "content": text.strip()}]
        for name, text in row.items()
    }


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def triplets(tmp_path):
    return write_rows(tmp_path / "data.jsonl", [triplet(i, long_words=5 + i) for i in range(20)])


def split_rows(data):
    return [row for split in (data.train, data.eval) if split is not None for row in split]


def test_plain_rows(tmp_path, triplets, hugging_face):
    manifest = prepare(triplets, tmp_path / "out", hugging_face)
    data = load_prepared(tmp_path / "out")
    assert data.manifest == manifest
    assert data.eval is None
    tokenizer = load_tokenizer(hugging_face)
    rows = [json.loads(line) for line in triplets.read_text().splitlines()]
    assert [row["id"] for row in data.train] == [row["id"] for row in rows]
    for row, source in zip(data.train, rows, strict=True):
        for prompt in ("prompt_short", "prompt_long"):
            for response in ("chosen", "rejected"):
                joined = tokenizer.decode(row[prompt] + row[response])
                assert joined == f"<s>{source[prompt]}{source[response]}</s>"
    assert {str(data.train.features[name].feature.dtype) for name in TOKEN_COLUMNS} == {"int32"}
    assert (manifest.kind, manifest.template, manifest.version) == ("triplet", "plain", __version__)
    assert manifest.vocab_size == tokenizer.vocab_size
    assert (manifest.read, manifest.kept, manifest.train, manifest.eval) == (20, 20, 20, 0)
    assert manifest.dropped == {"overlong": 0}


def test_plain_rows_of_sentencepiece(tmp_path, triplets, sentencepiece):
    prepare(triplets, tmp_path / "out", sentencepiece)
    tokenizer = load_tokenizer(sentencepiece)
    source = json.loads(triplets.read_text().splitlines()[0])
    row = load_prepared(tmp_path / "out").train[0]
    assert row["prompt_long"][0] == 1 and row["chosen"][-1] == row["rejected"][-1] == 2
    assert tokenizer.decode(row["prompt_long"] + row["chosen"]) == source["prompt_long"] + source["chosen"]


@pytest.mark.parametrize("form", ["messages", "text"])
def test_chat_rows(tmp_path, hugging_face, form):
    source = as_messages(triplet(3)) if form == "messages" else triplet(3) | {"chosen": "Turin."}
    path = write_rows(tmp_path / "data.jsonl", [source])
    manifest = prepare(path, tmp_path / "out", hugging_face, template="auto" if form == "messages" else "chat")
    row = load_prepared(tmp_path / "out").train[0]
    decode = load_tokenizer(hugging_face).decode
    prompt, answer = triplet(3)["prompt_short"], "Turin." if form == "text" else "In Turin, 3."
    assert decode(row["prompt_short"]) == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    assert decode(row["chosen"]) == f"{answer}<|im_end|>\n"
    assert manifest.template == "chat"


def test_prompt_of_several_messages(tmp_path, hugging_face):
    row = as_messages(triplet(0))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    row["prompt_long"] = [{"role": "system", "content": "be brief"}, *turns, *row["prompt_long"]]
    prepare(write_rows(tmp_path / "data.jsonl", [row]), tmp_path / "out", hugging_face)
    text = load_tokenizer(hugging_face).decode(load_prepared(tmp_path / "out").train[0]["prompt_long"])
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assis")
    assert text.endswith("Answer:<|im_end|>\n<|im_start|>assistant\n")


def test_pairs(tmp_path, hugging_face):
    rows = [{"prompt": f"who is {i}?", "chosen": " Po", "rejected": " Turin"} for i in range(3)]
    manifest = prepare(write_rows(tmp_path / "data.jsonl", rows), tmp_path / "out", hugging_face)
    data = load_prepared(tmp_path / "out")
    assert manifest.kind == "pair"
    assert set(data.train.column_names) == {"id", "prompt_short", "chosen", "rejected"}
    assert data.train["id"][:] == ["1", "2", "3"]
    assert load_tokenizer(hugging_face).decode(data.train[2]["prompt_short"]) == "<s>who is 2?"
    assert data.prompt_column("short") == data.prompt_column("long") == "prompt_short"


def test_prompt_column_of_triplets(tmp_path, triplets, hugging_face):
    prepare(triplets, tmp_path / "out", hugging_face)
    data = load_prepared(tmp_path / "out")
    assert (data.prompt_column("short"), data.prompt_column("long")) == ("prompt_short", "prompt_long")


def test_parquet_is_prepared_like_jsonl(tmp_path, triplets, hugging_face):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [as_messages(json.loads(line)) for line in triplets.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    prepare(tmp_path / "data.parquet", tmp_path / "from_parquet", hugging_face)
    prepare(write_rows(tmp_path / "chat.jsonl", rows), tmp_path / "from_jsonl", hugging_face)
    assert load_prepared(tmp_path / "from_parquet").train[:] == load_prepared(tmp_path / "from_jsonl").train[:]


def test_two_processes_give_the_same_data(tmp_path, triplets, hugging_face):
    one = prepare(triplets, tmp_path / "one", hugging_face, eval_count=4)
    two = prepare(triplets, tmp_path / "two", hugging_face, eval_count=4, num_proc=2)
    assert one == two
    assert split_rows(load_prepared(tmp_path / "one")) == split_rows(load_prepared(tmp_path / "two"))


def test_held_out_split(tmp_path, triplets, hugging_face):
    splits = {}
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        manifest = prepare(triplets, tmp_path / name, hugging_face, eval_count=6, seed=seed)
        data = load_prepared(tmp_path / name)
        assert (manifest.train, manifest.eval) == (len(data.train), len(data.eval)) == (14, 6)
        splits[name] = (data.train["id"][:], data.eval["id"][:])
    assert splits["first"] == splits["again"] != splits["other"]
    train, held_out = splits["first"]
    assert sorted(train + held_out) == sorted(f"row-{i}" for i in range(20))
    assert train == sorted(train, key=lambda row_id: int(row_id[4:]))


def test_drop_counts_whole_rows_and_cuts_nothing(tmp_path, triplets, hugging_face):
    prepare(triplets, tmp_path / "all", hugging_face)
    every = load_prepared(tmp_path / "all").train
    longest = np.array([len(row["prompt_long"]) + max(len(row["chosen"]), len(row["rejected"])) for row in every])
    limit = int(np.sort(longest)[11])
    manifest = prepare(triplets, tmp_path / "out", hugging_face, max_length=limit, overlong="drop", eval_count=2)
    data = load_prepared(tmp_path / "out")
    kept = int((longest <= limit).sum())
    assert kept == 12
    assert (manifest.read, manifest.kept, manifest.dropped) == (20, kept, {"overlong": 20 - kept})
    assert (manifest.train, manifest.eval) == (kept - 2, 2)
    expected = [row for row, length in zip(every, longest, strict=True) if length <= limit]
    assert sorted(split_rows(data), key=lambda row: int(row["id"][4:])) == expected


def test_overlong_rows_are_refused_with_what_to_change(tmp_path, triplets, hugging_face):
    prepare(triplets, tmp_path / "all", hugging_face)
    longest = load_prepared(tmp_path / "all").manifest.lengths
    needed = longest["prompt_long"].max + max(longest["chosen"].max, longest["rejected"].max)
    prepare(triplets, tmp_path / "fits", hugging_face, max_length=needed)
    with pytest.raises(ValueError) as caught:
        prepare(triplets, tmp_path / "out", hugging_face, max_length=needed - 1)
    message = str(caught.value)
    assert f"1 of 20 rows are longer than --max-length {needed - 1}" in message
    assert f"row-19 ({needed})" in message and f"raise it to {needed}" in message and "--overlong drop" in message
    assert not (tmp_path / "out").exists()


def test_length_statistics_are_lengths_of_rows(tmp_path, triplets, hugging_face):
    manifest = prepare(triplets, tmp_path / "out", hugging_face, eval_count=5)
    rows = split_rows(load_prepared(tmp_path / "out"))
    assert set(manifest.lengths) == set(TOKEN_COLUMNS)
    for name, statistics in manifest.lengths.items():
        lengths = sorted(len(row[name]) for row in rows)
        assert (statistics.min, statistics.max) == (lengths[0], lengths[-1])
        assert statistics.median == lengths[9] and statistics.p95 == lengths[18]


def test_token_lengths_follow_a_selection(tmp_path, triplets, hugging_face):
    prepare(triplets, tmp_path / "out", hugging_face)
    data = load_prepared(tmp_path / "out").train.select([7, 3, 19])
    assert token_lengths(data, "prompt_long").tolist() == [len(row["prompt_long"]) for row in data]


def test_fingerprint_changes_with_each_part_and_not_otherwise(tmp_path, hugging_face):
    source = write_rows(tmp_path / "data.jsonl", [as_messages(triplet(i)) for i in range(6)])
    base = {"input": source, "tokenizer": hugging_face, "max_length": 500, "eval_count": 1}
    runs = iter(range(100))

    def manifest(**changes):
        return prepare(output=tmp_path / f"out{next(runs)}", **base | changes)

    first = manifest()
    assert first.fingerprint == sha256_json(first.fingerprint_parts)
    assert first.fingerprint_parts["source"] == sha256_file(source)
    assert first.fingerprint_parts["chat_template"] == CHATML
    copied_source = shutil.copy(source, tmp_path / "renamed.jsonl")
    copied_tokenizer = shutil.copytree(hugging_face, tmp_path / "copy")
    unchanged = [{}, {"num_proc": 2}, {"input": copied_source}, {"tokenizer": str(copied_tokenizer)}]
    assert {manifest(**same).fingerprint for same in unchanged} == {first.fingerprint}

    changed = {
        "source": {"input": write_rows(tmp_path / "other.jsonl", [as_messages(triplet(i)) for i in range(7)])},
        "tokenizer": {"tokenizer": str(write_hugging_face(tmp_path / "other", vocab_size=380))},
        "chat_template": {"tokenizer": str(write_hugging_face(tmp_path / "strict", chat_template=STRICT))},
        "max_length": {"max_length": 501},
        "overlong": {"overlong": "drop"},
        "eval_count": {"eval_count": 2},
        "seed": {"seed": 5},
    }
    for part, change in changed.items():
        other = manifest(**change)
        differing = {key for key, value in other.fingerprint_parts.items() if value != first.fingerprint_parts[key]}
        assert differing == {part}
        assert other.fingerprint != first.fingerprint


def test_template_mode_is_part_of_the_fingerprint(tmp_path, triplets, hugging_face):
    plain = prepare(triplets, tmp_path / "plain", hugging_face)
    chat = prepare(triplets, tmp_path / "chat", hugging_face, template="chat")
    assert (plain.fingerprint_parts["template"], chat.fingerprint_parts["template"]) == ("plain", "chat")
    assert plain.fingerprint_parts["chat_template"] is None
    assert plain.fingerprint != chat.fingerprint


def refusal(tmp_path, rows, tokenizer, **options):
    """The message prepare refuses with; nothing but the input may be left behind."""
    (tmp_path / "refused").mkdir()
    path = write_rows(tmp_path / "refused" / "data.jsonl", rows)
    with pytest.raises(ValueError) as caught:
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


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    tokenizer = str(write_hugging_face(tmp_path / "rewriting", chat_template=REWRITING))
    message = refusal(tmp_path, [as_messages(triplet(0))], tokenizer)
    assert f"by {tokenizer}: line 1: chosen: the chat template does not write prompt_short with an answer" in message


class UnknownOnly:
    """A tokenizer that knows no word of the alphabet's second half and drops them."""

    eos_token_id = 0

    def encode(self, text, *, add_special_tokens):
        return [ord(character) for character in text if character < "m"]

    def encode_continuation(self, text):
        return self.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [("xyz", "ab", "chosen: tokenizes to nothing"), ("abz", "ab", "rejected: has the same tokens as chosen")],
)
def test_responses_that_tokenize_to_nothing_or_alike(chosen, rejected, reason):
    responses = {"chosen": chosen, "rejected": rejected}
    with pytest.raises(ValueError, match=reason):
        tokenize_row({"prompt_short": "a"}, responses, UnknownOnly(), "plain")


def test_existing_output(tmp_path, triplets, hugging_face):
    out = tmp_path / "out"
    prepare(triplets, out, hugging_face)
    with pytest.raises(ValueError, match="already exists"):
        prepare(triplets, out, hugging_face, eval_count=1)
    assert load_prepared(out).manifest.eval == 0
    prepare(triplets, out, hugging_face, eval_count=1, overwrite=True)
    assert load_prepared(out).manifest.eval == 1
    precious = tmp_path / "home"
    precious.mkdir()
    with pytest.raises(ValueError, match="not a prepared directory"):
        prepare(triplets, precious, hugging_face, overwrite=True)
    assert precious.is_dir()


def test_a_refused_overwrite_keeps_the_old_data(tmp_path, triplets, hugging_face):
    before = prepare(triplets, tmp_path / "out", hugging_face)
    with pytest.raises(ValueError, match="longer than"):
        prepare(triplets, tmp_path / "out", hugging_face, max_length=10, overwrite=True)
    assert load_prepared(tmp_path / "out").manifest == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data.jsonl", "out"]


def test_an_interruption_leaves_nothing(tmp_path, triplets, hugging_face, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_solopo.data.tokenize._save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(triplets, tmp_path / "out", hugging_face)
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.jsonl"]


def test_only_the_promised_files_are_left(tmp_path, triplets, hugging_face):
    prepare(triplets, tmp_path / "out", hugging_face, eval_count=1)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["eval", "manifest.json", "train"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data.jsonl", "out"]


def spoil_manifest(out, **changes):
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (shutil.rmtree, "no manifest.json there"),
        (lambda out: (out / "manifest.json").unlink(), "no manifest.json there"),
        (lambda out: (out / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda out: spoil_manifest(out, format_version=99, new_key=1), "format version 99, this program reads 1"),
        (lambda out: spoil_manifest(out, kept="many"), "manifest.json is damaged (kept: "),
        (lambda out: spoil_manifest(out, train=3), "train/ has 18 rows, the manifest says 3"),
        (lambda out: shutil.rmtree(out / "eval"), "eval/ is missing or damaged"),
        (lambda out: next((out / "train").glob("*.arrow")).unlink(), "train/ is missing or damaged"),
        (lambda out: next((out / "train").glob("*.arrow")).write_bytes(b"x" * 99), "train/ is missing or damaged"),
        (lambda out: (out / "train" / "state.json").write_text("{"), "train/ is missing or damaged"),
        (lambda out: spoil_manifest(out, kind="pair"), "train/ has columns "),
    ],
)
def test_unusable_directories_are_one_line(tmp_path, triplets, hugging_face, spoil, reason):
    prepare(triplets, tmp_path / "out", hugging_face, eval_count=2)
    spoil(tmp_path / "out")
    with pytest.raises(ValueError) as caught:
        load_prepared(tmp_path / "out")
    message = str(caught.value)
    assert reason in message and "\n" not in message
    assert message.startswith(f"{tmp_path / 'out'}: ") and message.endswith("megatron-solopo data prepare")

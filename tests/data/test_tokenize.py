import fcntl
import json
import shutil
from datetime import date, datetime, time
from unittest import mock

import numpy as np
import pytest

from megatron_solopo import __version__
from megatron_solopo.data import template_clock, tokenize_parts
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.files import sha256_file
from tests.data.sample_rows import as_messages, prepare, triplet, write_rows
from tests.data.tiny_tokenizers import CHATML, STRICT, write_hugging_face

TOKEN_COLUMNS = ("prompt_short", "prompt_long", "chosen", "rejected")


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
    assert set(data.train.column_names) == {"id", "evidence_depths", "prompt_short", "chosen", "rejected"}
    assert data.train["id"][:] == ["1", "2", "3"]
    assert load_tokenizer(hugging_face).decode(data.train[2]["prompt_short"]) == "<s>who is 2?"
    assert data.prompt_column("short") == data.prompt_column("long") == "prompt_short"


def test_instructions(tmp_path, hugging_face):
    rows = [{"prompt": f"who is {i}?", "completion": " Po" * i} for i in (1, 2)]
    manifest = prepare(write_rows(tmp_path / "data.jsonl", rows), tmp_path / "out", hugging_face)
    data, tokenizer = load_prepared(tmp_path / "out"), load_tokenizer(hugging_face)
    assert manifest.kind == "instruction" and set(manifest.lengths) == {"prompt_short", "chosen"}
    assert set(data.train.column_names) == {"id", "evidence_depths", "prompt_short", "chosen"}
    assert [tokenizer.decode(row["chosen"]) for row in data.train] == [" Po</s>", " Po Po</s>"]


def test_parquet_is_prepared_like_jsonl(tmp_path, triplets, hugging_face):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [as_messages(json.loads(line)) for line in triplets.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    prepare(tmp_path / "data.parquet", tmp_path / "from_parquet", hugging_face)
    prepare(write_rows(tmp_path / "chat.jsonl", rows), tmp_path / "from_jsonl", hugging_face)
    assert load_prepared(tmp_path / "from_parquet").train[:] == load_prepared(tmp_path / "from_jsonl").train[:]


def test_where_the_evidence_lies_is_carried(tmp_path, hugging_face):
    rows = [triplet(0) | {"evidence_depths": [0.25, 1]}, triplet(1), triplet(2) | {"evidence_depths": None}]
    prepare(write_rows(tmp_path / "data.jsonl", rows), tmp_path / "out", hugging_face)
    assert load_prepared(tmp_path / "out").train["evidence_depths"][:] == [[0.25, 1.0], [], []]


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
    with pytest.raises(UserError) as caught:
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
        numbers = f"min {lengths[0]}, median {lengths[9]}, p95 {lengths[18]}, max {lengths[-1]}"
        assert f"tokens of {name}: {numbers}" in str(manifest).splitlines()


def test_the_manifest_reads_what_was_dropped(tmp_path, triplets, hugging_face):
    everything = prepare(triplets, tmp_path / "all", hugging_face)
    assert str(everything).startswith("triplet rows: 20 read, 20 kept (20 train, 0 eval)\ndropped: 0 overlong\n")
    limit = everything.lengths["prompt_long"].max
    some = prepare(triplets, tmp_path / "some", hugging_face, max_length=limit, overlong="drop", eval_count=2)
    assert 0 < some.kept < 20
    assert f"{some.kept} kept ({some.kept - 2} train, 2 eval)\ndropped: {20 - some.kept} overlong" in str(some)


def test_the_fingerprint_is_that_of_the_tokens_whatever_they_were_made_from(tmp_path, hugging_face):
    source = write_rows(tmp_path / "data.jsonl", [as_messages(triplet(i)) for i in range(6)])
    base = {"input": source, "tokenizer": hugging_face, "max_length": 500, "eval_count": 1}
    runs = iter(range(100))

    def manifest(**changes):
        return prepare(**{"output": tmp_path / f"out{next(runs)}"} | base | changes)

    first = manifest()
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
        changes_tokens = part in ("source", "eval_count", "seed")
        assert (other.fingerprint != first.fingerprint) == changes_tokens, part


def test_a_template_that_writes_the_date_gives_another_fingerprint_on_another_day(tmp_path, hugging_face, monkeypatch):
    """transformers gives templates `strftime_now`, which asks the clock. Llama 3.2's template uses it."""
    source = write_rows(tmp_path / "data.jsonl", [as_messages(triplet(i)) for i in range(4)])
    dated = str(write_hugging_face(tmp_path / "dated", chat_template="{{ strftime_now('%d %b %Y') }}" + CHATML))
    found = []
    for number, day in enumerate([date(2024, 7, 26), date(2024, 7, 26), date(2024, 7, 27)]):
        monkeypatch.setattr(template_clock, "_started", datetime.combine(day, time()))
        found.append(prepare(source, tmp_path / f"out{number}", dated))
    assert found[0].fingerprint == found[1].fingerprint != found[2].fingerprint
    assert found[0].fingerprint_parts == found[2].fingerprint_parts, "nothing else tells them apart"


def test_template_mode_is_part_of_the_fingerprint(tmp_path, triplets, hugging_face):
    plain = prepare(triplets, tmp_path / "plain", hugging_face)
    chat = prepare(triplets, tmp_path / "chat", hugging_face, template="chat")
    assert (plain.fingerprint_parts["template"], chat.fingerprint_parts["template"]) == ("plain", "chat")
    assert plain.fingerprint_parts["chat_template"] is None
    assert plain.fingerprint != chat.fingerprint


def test_only_the_promised_files_are_left(tmp_path, triplets, hugging_face):
    prepare(triplets, tmp_path / "out", hugging_face, eval_count=1)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["eval", "manifest.json", "train"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data.jsonl", "out"]


def test_a_killed_call_leaves_what_it_tokenized_to_the_next_one(tmp_path, hugging_face):
    path = write_rows(tmp_path / "rows.jsonl", [triplet(number) for number in range(50)])
    whole = prepare(path, tmp_path / "whole", hugging_face)
    tokenize_part, made = tokenize_parts._tokenize_part, []

    def killed_at_the_third(*arguments):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(tokenize_part(*arguments))
        return made[-1]

    with mock.patch.object(tokenize_parts, "_tokenize_part", killed_at_the_third), pytest.raises(KeyboardInterrupt):
        prepare(path, tmp_path / "out", hugging_face)
    assert not (tmp_path / "out").exists() and sum(map(len, made)) == 32
    counting = mock.Mock(side_effect=tokenize_part)
    with mock.patch.object(tokenize_parts, "_tokenize_part", counting):
        assert prepare(path, tmp_path / "out", hugging_face) == whole
    assert [call.args[-1] for call in counting.call_args_list] == [range(32, 48), range(48, 50)]
    assert split_rows(load_prepared(tmp_path / "out")) == split_rows(load_prepared(tmp_path / "whole"))
    assert not list(tmp_path.glob(".*")), "no folder of work stays"


def test_what_was_tokenized_under_other_end_tokens_is_not_taken(tmp_path, hugging_face):
    """They decide what the template counts as lost or doubled, which each part keeps."""
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(hugging_face, tokenizer)
    path = write_rows(tmp_path / "rows.jsonl", [triplet(number) for number in range(20)])
    settings = tokenizer / "generation_config.json"
    settings.write_text('{"eos_token_id": [0, 1]}')
    interrupted = mock.patch.object(tokenize_parts, "concatenate_datasets", side_effect=KeyboardInterrupt)
    for ends, parts in (([0, 1], 2), ([0, 1], 0), ([0, 2], 2)):
        settings.write_text(json.dumps({"eos_token_id": ends}))
        counting = mock.Mock(side_effect=tokenize_parts._tokenize_part)
        with (
            interrupted,
            mock.patch.object(tokenize_parts, "_tokenize_part", counting),
            pytest.raises(KeyboardInterrupt),
        ):
            prepare(path, tmp_path / "out", str(tokenizer))
        assert counting.call_count == parts


def test_what_another_call_tokenized_otherwise_is_not_taken(tmp_path, hugging_face):
    path = write_rows(tmp_path / "rows.jsonl", [triplet(number) for number in range(20)])
    with (
        mock.patch.object(tokenize_parts, "concatenate_datasets", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        prepare(path, tmp_path / "out", hugging_face)
    write_rows(path, [triplet(number) for number in range(100, 120)])
    prepare(path, tmp_path / "out", hugging_face)
    prepare(path, tmp_path / "anew", hugging_face)
    assert split_rows(load_prepared(tmp_path / "out")) == split_rows(load_prepared(tmp_path / "anew"))


def test_two_calls_do_not_write_the_same_output(tmp_path, triplets, hugging_face):
    (tmp_path / ".out.work").mkdir()
    with (tmp_path / ".out.work" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="out: another data prepare is writing it"):
            prepare(triplets, tmp_path / "out", hugging_face)
    prepare(triplets, tmp_path / "out", hugging_face)


def test_a_folder_is_prepared_as_one_file(tmp_path, hugging_face):
    rows = [triplet(number) for number in range(20)]
    (tmp_path / "shards").mkdir()
    for start in (0, 10):
        write_rows(tmp_path / "shards" / f"rows-{start:02}.jsonl", rows[start : start + 10])
    whole = prepare(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "whole", hugging_face, eval_count=3)
    folder = prepare(tmp_path / "shards", tmp_path / "out", hugging_face, eval_count=3, num_proc=2)
    assert folder.fingerprint == whole.fingerprint and folder.read == 20

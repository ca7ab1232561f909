import json
import re
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_solopo.data.rows import RowError, read_rows, validate_file
from megatron_solopo.errors import UserError

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "data.md"


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def tool(content):
    return {"role": "tool", "content": content}


PART = {"type": "text", "text": "yes"}


def call(name, arguments=None):
    return {"type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}


def calling(*calls):
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def triplet(row_id, **changes):
    row = {"id": row_id, "prompt_short": "s", "prompt_long": "l l", "chosen": "yes", "rejected": "no"} | changes
    return {key: value for key, value in row.items() if value is not ...}


def chat_triplet(row_id, **changes):
    messages = {
        "prompt_short": [user("s")],
        "prompt_long": [{"role": "system", "content": ""}, user("l")],
        "chosen": [assistant("yes")],
        "rejected": [assistant("no")],
    }
    return triplet(row_id, **messages | changes)


def pair(**changes):
    return {"prompt": "p", "chosen": "yes", "rejected": "no"} | changes


def write_jsonl(path, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def errors_of(tmp_path, rows):
    return validate_file(write_jsonl(tmp_path / "data.jsonl", rows)).errors


@pytest.mark.parametrize(
    ("rows", "kind", "forms"),
    [
        ([triplet("a"), triplet("b")], "triplet", ("text",)),
        ([chat_triplet("a"), chat_triplet(7)], "triplet", ("messages",)),
        ([triplet("a"), chat_triplet("b")], "triplet", ("messages", "text")),
        ([pair(), pair(id="x", score=0.5)], "pair", ("text",)),
        ([{"prompt": "p", "completion": "yes"}], "instruction", ("text",)),
        ([{"prompt": [user("p")], "completion": [assistant("yes")]}], "instruction", ("messages",)),
        ([pair(prompt=[user("p")], chosen=[assistant("y")], rejected=[assistant("n")])], "pair", ("messages",)),
    ],
)
def test_good_files(tmp_path, rows, kind, forms):
    report = validate_file(write_jsonl(tmp_path / "data.jsonl", rows))
    assert report.errors == []
    assert (report.rows, report.kind, report.forms) == (len(rows), kind, forms)
    assert str(report).splitlines()[-1] == f"{tmp_path}/data.jsonl: {len(rows)} rows of kind {kind}, no errors"


def test_rows_are_read_as_written(tmp_path):
    rows = list(read_rows(write_jsonl(tmp_path / "data.jsonl", [chat_triplet(7), b"", b"  \r", chat_triplet("b")])))
    assert [(row.line, row.id, row.kind, row.form) for row in rows] == [
        (1, "7", "triplet", "messages"),
        (4, "b", "triplet", "messages"),
    ]
    assert rows[0].contents["prompt_long"] == [{"role": "system", "content": ""}, user("l")]
    assert list(rows[0].contents) == ["prompt_short", "prompt_long", "chosen", "rejected"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "completion": " "}, "is blank"),
        (pair(completion="y"), "does not go with chosen, rejected; an instruction has a prompt beside it"),
        (triplet("a", completion="y"), "does not go with chosen, prompt_long, prompt_short, rejected; an instruction"),
    ],
)
def test_an_instruction_has_a_prompt_and_a_completion(tmp_path, row, reason):
    error = errors_of(tmp_path, [row])[0]
    assert error.field == "completion" and error.reason.startswith(reason)


def test_a_pair_without_id_is_known_by_its_line(tmp_path):
    rows = list(read_rows(write_jsonl(tmp_path / "data.jsonl", [pair(), pair(id="x"), pair()])))
    assert [row.id for row in rows] == ["1", "x", "3"]


@pytest.mark.parametrize(
    ("bad", "field", "reason"),
    [
        (triplet("c", chosen=...), "chosen", "is missing or null"),
        (triplet("c", rejected=None), "rejected", "is missing or null"),
        (triplet("c", prompt_long=...), "prompt_long", "is missing or null"),
        (triplet("c", prompt_short=...), "prompt_short", "is missing or null"),
        (triplet("c", prompt_short=..., prompt_long=...), "prompt", "the row has neither"),
        (triplet("c", prompt="p"), "prompt", "the row has both, so its kind is unclear"),
        (triplet("c") | {"evidence_depths": 0.5}, "evidence_depths", "expected a list of numbers from 0 to 1"),
        (triplet("c") | {"evidence_depths": [0.5, 1.2]}, "evidence_depths", "expected a list of numbers from 0 to 1"),
        (triplet(...), "id", "is missing or null"),
        (triplet(1.5), "id", "expected a string or an integer, got a number"),
        (triplet(True), "id", "expected a string or an integer, got a boolean"),
        (triplet(""), "id", "is empty"),
        (triplet("a"), "id", "'a' is already the id of line 1"),
        (triplet("c", chosen=""), "chosen", "is empty"),
        (triplet("c", rejected=" \n"), "rejected", "is blank"),
        (triplet("c", prompt_short=" "), "prompt_short", "is blank"),
        (triplet("c", chosen=3), "chosen", "expected a string or a list of messages, got a number"),
        (triplet("c", prompt_long={"a": 1}), "prompt_long", "expected a string or a list of messages, got an object"),
        (triplet("c", chosen="no"), "rejected", "is the same as chosen"),
        (triplet("c", chosen=" no\n"), "rejected", "is the same as chosen"),
        (triplet("c", chosen="\ud800"), "chosen", "holds a lone surrogate at character 1, which is not Unicode text"),
        (triplet("c", chosen=[assistant("y")]), "chosen", "is messages, but prompt_short is text"),
        (pair(), "", "is of kind pair, but line 1 of kind triplet; one file holds one kind"),
        (
            chat_triplet("c", prompt_short=[]),
            "prompt_short",
            "expected messages that end with a user or a tool",
        ),
        (
            chat_triplet("c", prompt_short=[user("s"), assistant("y")]),
            "prompt_short",
            "got roles ['user', 'assistant']",
        ),
        (chat_triplet("c", prompt_short=[user(" ")]), "prompt_short", "message 0: content is blank"),
        (
            chat_triplet("c", chosen=[assistant("y") | {"reasoning_content": "\ud800"}]),
            "chosen",
            "message 0: reasoning_content holds a lone surrogate at character 1",
        ),
        (
            chat_triplet("c", chosen=[calling(call("f", {"place": "\ud800"}))]),
            "chosen",
            "arguments: a text holds a lone surrogate at character 1",
        ),
        (chat_triplet("c", prompt_short=["s"]), "prompt_short", "message 0: expected an object with role and content"),
        (chat_triplet("c", prompt_short=[user(3)]), "prompt_short", "message 0: content: expected a string, got a num"),
        (chat_triplet("c", chosen=[]), "chosen", "expected one assistant message, or several with tool and user"),
        (chat_triplet("c", chosen=[user("y")]), "chosen", "got roles ['user']"),
        (chat_triplet("c", chosen=[assistant("a"), tool("b")]), "chosen", "got roles ['assistant', 'tool']"),
        (chat_triplet("c", chosen=[assistant("")]), "chosen", "message 0: content is empty"),
        (chat_triplet("c", chosen=[assistant("no")]), "rejected", "is the same as chosen"),
        (
            chat_triplet("c", chosen=[{"role": "bot", "content": "y"}]),
            "chosen",
            "message 0: role 'bot'; legal: system, user, assistant, tool",
        ),
        (
            chat_triplet("c", prompt_long=[user("y") | {"tool_calls": [call("f")]}]),
            "prompt_long",
            "message 0: unknown key 'tool_calls'; legal: role, content",
        ),
        (chat_triplet("c", chosen=[assistant([{"type": "image"}])]), "chosen", "or a list of one part"),
        (chat_triplet("c", chosen=[assistant([PART, PART])]), "chosen", "message 0: content: expected a string, or"),
        (chat_triplet("c", chosen=[calling(1)]), "chosen", "message 0: tool_calls: expected objects such as"),
        (
            chat_triplet("c", chosen=[calling(call("f") | {"result": 1})]),
            "chosen",
            "message 0: tool_calls: unknown key 'result'; legal: id, type, function: name, arguments",
        ),
        (
            chat_triplet("c", chosen=[calling(call("f", arguments="{"))]),
            "chosen",
            "tool_calls: arguments are text that is not valid JSON",
        ),
        (
            chat_triplet("c", chosen=[calling(call("f", arguments="[1]"))]),
            "chosen",
            "arguments: expected an object, or the JSON text of one, got a list",
        ),
        (chat_triplet("c", chosen=[assistant(None)]), "chosen", "message 0: content: expected a string, got null"),
        (["a"], "", "expected a JSON object, got a list"),
        (b'{"id": "c", ', "", "not valid JSON: Expecting property name enclosed in double quotes at column 13"),
        (b'{"id": "\xff"}', "", "not UTF-8: byte 0xff at position 9"),
        (b"[" * 200_000, "", "not valid JSON: "),
    ],
)
def test_a_bad_row_is_found_at_its_line(tmp_path, bad, field, reason):
    errors = errors_of(tmp_path, [triplet("a"), b"", triplet("b"), bad, triplet("d")])
    assert [(error.line, error.field) for error in errors] == [(4, field)]
    assert reason in errors[0].reason


def test_every_error_is_listed(tmp_path):
    rows = [triplet("a", chosen="", prompt_long=3), b"nonsense", triplet("a", rejected="yes"), pair(prompt="")]
    report = validate_file(write_jsonl(tmp_path / "data.jsonl", rows))
    assert [(error.line, error.field) for error in report.errors] == [
        (1, "prompt_long"),
        (1, "chosen"),
        (2, ""),
        (3, "rejected"),
        (3, "id"),
        (4, "prompt"),
        (4, ""),
    ]
    lines = str(report).splitlines()
    assert lines[1] == f"{tmp_path}/data.jsonl:1: chosen: is empty"
    assert lines[2].startswith(f"{tmp_path}/data.jsonl:2: not valid JSON")
    assert lines[-1] == f"{tmp_path}/data.jsonl: 7 errors, 4 of 4 rows are bad"
    as_json = json.loads(json.dumps(report.to_json()))
    assert as_json["errors"][1] == {"line": 1, "field": "chosen", "reason": "is empty"}
    assert (as_json["rows"], as_json["kind"]) == (4, "triplet")


def test_one_mistake_in_every_row_is_one_line_with_the_first_places(tmp_path):
    rows = [triplet(f"r{number}", chosen="") for number in range(30)]
    lines = str(validate_file(write_jsonl(tmp_path / "data.jsonl", rows))).splitlines()
    assert lines == [
        f"{tmp_path}/data.jsonl: 30 rows (lines 1, 2, 3, 4, 5, ...): chosen: is empty",
        f"{tmp_path}/data.jsonl: 30 errors, 30 of 30 rows are bad",
    ]


def test_rows_of_something_else_are_one_mistake(tmp_path):
    errors = errors_of(tmp_path, [{"id": "q", "question": "?", "answer": "!"}])
    assert [(error.line, error.field) for error in errors] == [(1, "")]
    assert errors[0].reason.startswith("is no preference row: it has id, question, answer; expected prompt_short")


def test_a_file_without_rows_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\n\n")
    with pytest.raises(UserError, match=r"data\.jsonl: has no rows"):
        validate_file(tmp_path / "data.jsonl")


def test_parquet_messages(tmp_path):
    # Parquet gives every message the keys of all: those that are null do not count.
    rows = [chat_triplet("a"), chat_triplet("b")]
    rows[0]["chosen"] = [assistant("yes") | {"name": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    report = validate_file(tmp_path / "data.parquet")
    assert (report.rows, report.kind, report.forms, report.errors) == (2, "triplet", ("messages",), [])
    assert next(read_rows(tmp_path / "data.parquet")).contents["chosen"] == [assistant("yes")]


def test_a_content_of_one_part_is_its_text(tmp_path):
    part = PART | {"image_url": None}
    rows = list(read_rows(write_jsonl(tmp_path / "data.jsonl", [chat_triplet("a", chosen=[assistant([part])])])))
    assert rows[0].errors == [] and rows[0].contents["chosen"] == [assistant("yes")]


def test_parquet_bad_rows_beyond_one_batch(tmp_path):
    rows = [triplet(f"r{i}") for i in range(200)]
    rows[150] |= {"chosen": None}
    table = pa.Table.from_pylist(rows)
    broken = pa.array([b"no"] * 70 + [b"\xff"] + [b"no"] * 129).view(pa.string())
    table = table.set_column(table.column_names.index("rejected"), "rejected", broken)
    pq.write_table(table, tmp_path / "data.parquet")
    assert validate_file(tmp_path / "data.parquet").errors == [
        RowError(71, "", "not UTF-8: byte 0xff"),
        RowError(151, "chosen", "is missing or null"),
    ]


def test_parquet_cut_in_the_middle_is_reported(tmp_path):
    path = tmp_path / "data.parquet"
    rows = [triplet(f"r{i}", prompt_long=f"{i} " * 500) for i in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(2)
    start = min(group.column(i).data_page_offset for i in range(group.num_columns))
    content[start : start + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"data\.parquet: cannot be read as parquet after row 192: "):
        validate_file(path)


def test_validation_streams(tmp_path):
    rows = (triplet(f"r{i}", prompt_long="x" * 100_000) for i in range(100))
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    validate_file(path)
    tracemalloc.start()
    assert validate_file(path).rows == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 10_000_000 > 5 * peak


def test_what_goes_to_the_template_and_what_nothing_reads_is_listed_once(tmp_path):
    tools = [{"type": "function", "function": {"name": "w", "parameters": {}}}]
    rows = [
        triplet("a") | {"chat_template_kwargs": {"enable_thinking": False}, "source": "x"},
        triplet("b") | {"tools": tools, "source": None},
        triplet("c") | {"tools": json.dumps(tools), "source": "y", "note": 1},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert str(validate_file(path)).splitlines() == [
        f"{path}: given to the chat template: enable_thinking (1 row), tools (2 rows)",
        f"{path}: fields that are not read: source (2 rows), note (1 row)",
        f"{path}: 3 rows of kind triplet, no errors",
    ]
    assert [row.arguments.tools for row in read_rows(path)] == [None, tools, tools]


def test_parquet_gives_tools_without_the_keys_that_other_rows_have(tmp_path):
    tools = [[{"name": "w", "parameters": {"a": 1}}], [{"name": "v", "parameters": {"b": 2}}]]
    rows = [triplet(number) | {"tools": each, "source": "x"} for number, each in zip("ab", tools, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert [row.arguments.tools for row in read_rows(tmp_path / "data.parquet")] == tools
    assert validate_file(tmp_path / "data.parquet").unread_fields == {"source": 2}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object of arguments"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs: 'tokenize' is no argument of a template"),
        ({"tools": "{"}, "tools: is text that is not valid JSON"),
        ({"tools": {"name": "w"}}, "tools: expected a list of objects"),
    ],
)
def test_illegal_arguments_of_a_row(tmp_path, fields, reason):
    assert reason in str(validate_file(write_jsonl(tmp_path / "data.jsonl", [triplet("a") | fields])))


QUESTION, OTHER = [{"role": "system", "content": "Be brief."}, user("q")], [user("p")]
SEARCH = [calling(call("search", '{"for": "q"}')), tool("found")]


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        # TRL without an explicit prompt, also with a response of several turns.
        ({"chosen": [*QUESTION, assistant("y")], "rejected": [*QUESTION, assistant("n")]}, QUESTION, 1),
        (
            {"chosen": [*QUESTION, *SEARCH, assistant("y")], "rejected": [*QUESTION, assistant("n")]},
            QUESTION,
            3,
        ),
        (
            {"chosen": [*QUESTION, *SEARCH, assistant("y")], "rejected": [*QUESTION, *SEARCH, assistant("n")]},
            QUESTION + SEARCH,
            1,
        ),
        # UltraFeedback: the prompt is the question's text, and other columns come with it.
        (
            {
                "prompt": "p",
                "prompt_id": "7",
                "chosen": [*OTHER, assistant("y")],
                "rejected": [*OTHER, assistant("n")],
                "messages": [*OTHER, assistant("y")],
                "score_chosen": 8.5,
                "score_rejected": None,
            },
            OTHER,
            1,
        ),
        # A prompt of messages that both conversations repeat, and one that they do not.
        (
            {"prompt": QUESTION, "chosen": [*QUESTION, assistant("y")], "rejected": [*QUESTION, assistant("n")]},
            QUESTION,
            1,
        ),
        ({"prompt": QUESTION, "chosen": [assistant("y")], "rejected": [assistant("n")]}, QUESTION, 1),
    ],
)
def test_answers_that_are_whole_conversations(tmp_path, row, prompt, chosen):
    path = write_jsonl(tmp_path / "data.jsonl", [row])
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "data.parquet")
    for file in (path, tmp_path / "data.parquet"):
        report = validate_file(file)
        assert (report.kind, report.forms, report.errors) == ("pair", ("messages",), [])
        read = next(read_rows(file))
        assert read.contents["prompt"] == prompt
        assert [len(read.contents[name]) for name in ("chosen", "rejected")] == [chosen, 1]
        assert read.contents["rejected"] == [assistant("n")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"chosen": [*OTHER, assistant("y")], "rejected": [*QUESTION, assistant("n")]},
            "is missing, and chosen and rejected do not begin with the same user or tool message",
        ),
        (
            {"prompt": "q", "chosen": [*OTHER, assistant("y")], "rejected": [*OTHER, assistant("n")]},
            "is not the text of a message with which both chosen and rejected begin",
        ),
        (
            {"prompt": QUESTION, "chosen": [*OTHER, assistant("y")], "rejected": [*QUESTION, assistant("n")]},
            "is not what chosen and rejected begin with",
        ),
        ({"id": "x", "chosen": "p yes", "rejected": "p no"}, "write it into its own field, as trl.extract_prompt does"),
    ],
)
def test_conversations_that_do_not_tell_their_prompt(tmp_path, row, reason):
    (error,) = errors_of(tmp_path, [row])
    assert error.field == "prompt" and reason in error.reason


def test_prompts_are_those_that_trl_extracts(tmp_path):
    trl = pytest.importorskip("trl")
    row = {"chosen": [*QUESTION, assistant("a"), *OTHER, assistant("y")]}
    row["rejected"] = [*row["chosen"][:-1], assistant("n")]
    (read,) = read_rows(write_jsonl(tmp_path / "data.jsonl", [row]))
    assert read.contents == trl.extract_prompt(row)


def completion(response, overall, *ratings):
    """Of raw UltraFeedback."""
    names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    return {
        "annotations": {name: {"Rating": str(rating)} for name, rating in zip(names, ratings, strict=True)},
        "fine-grained_score": sum(ratings) / 4,
        "overall_score": overall,
        "response": response,
    }


SCORED = [
    {"instruction": "Who?", "completions": [completion("A.", 3.0, 4, 4, 4, 4), completion("B.", 8.5, 3, 4, 4, 4),
                                            completion("C.", 3.0, 1, 1, 1, 1), completion("D.", 8.5, 4, 4, 4, 4)]},
    {"instruction": "Where?", "completions": [completion("A.", 7.0, 4, 4, 4, 4), completion("B.", 7.0, 3, 4, 4, 4)]},
    {"instruction": "When?", "completions": [completion("A.", 2.0, 1, 1, 1, 1), completion("  ", 9.0, 1, 1, 1, 1)]},
    {"instruction": "Why?", "completions": []},
]  # fmt: skip


def test_the_guide_makes_pairs_of_scored_answers(tmp_path, monkeypatch, capsys):
    section = GUIDE.read_text(encoding="utf-8").partition("### Several scored answers")[2]
    (script,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(SCORED))
    written = set()
    for _ in range(2):
        exec(script, {})
        assert "{'rows without a pair': 3, 'pairs': 1}" in capsys.readouterr().out
        written.add((tmp_path / "pairs.jsonl").read_text())
    (text,) = written
    pair = json.loads(text)
    rejected = pair.pop("rejected")
    assert pair == {"prompt": [user("Who?")], "chosen": [assistant("B.")]}
    assert rejected in ([assistant("A.")], [assistant("C.")])
    report = validate_file(tmp_path / "pairs.jsonl")
    assert (report.kind, report.rows, report.errors) == ("pair", 1, [])


def test_scored_answers_are_no_pair_and_the_error_names_the_columns(tmp_path):
    pq.write_table(pa.Table.from_pylist(SCORED[:2]), tmp_path / "rows.parquet")
    message = str(validate_file(tmp_path / "rows.parquet"))
    assert "is no preference row: it has instruction, completions; expected prompt_short" in message
    assert "the guide to data shows how to choose a pair of completions" in message


def write_rows_as(suffix, folder, rows):
    if suffix == "jsonl":
        return write_jsonl(folder / "rows.jsonl", rows)
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_unpaired_preference_is_no_instruction(tmp_path, suffix):
    rows = [{"prompt": "p", "completion": "good", "label": True}, {"prompt": "p", "completion": "bad", "label": False}]
    report = validate_file(write_rows_as(suffix, tmp_path, rows))
    assert [(error.line, error.field) for error in report.errors] == [(1, "label"), (2, "label")]
    assert "unpaired preference" in str(report)
    classes = write_jsonl(tmp_path / "classes.jsonl", [row | {"label": "other"} for row in rows])
    assert not validate_file(classes).errors


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_pictures_beside_the_text_are_refused(tmp_path, suffix):
    """A row is never trained on without its picture. Other rows of such a file have empty columns."""
    pair = {"prompt": "What is on it?", "chosen": "a cat", "rejected": "a dog"}
    rows = [pair | {"images": ["cat.png"], "image": None}, pair | {"images": [], "image": "cat.png"}]
    rows.append(pair | {"images": [], "image": None})
    report = validate_file(write_rows_as(suffix, tmp_path, rows))
    assert [(error.line, error.field) for error in report.errors] == [(1, "images"), (2, "image")]
    assert "take the rows without pictures" in report.errors[0].reason

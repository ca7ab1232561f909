"""`data validate --show`: the tokens of rows, and which of them count."""

import json

import pytest
from click.testing import CliRunner

from megatron_solopo.cli.main import cli
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.data.tokenizer import load_tokenizer
from tests.data.conversations import ROWS, write_tokenizer
from tests.data.sample_rows import prepare, triplet, write_rows

GREEN, YELLOW = "\x1b[32m", "\x1b[33m"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "qwen3", "qwen3")


def show(path, tokenizer, *options, color=False, env=None):
    arguments = ["data", "validate", str(path), "--show", "2", "--tokenizer", tokenizer, *options]
    result = CliRunner().invoke(cli, arguments, color=color, env={"NO_COLOR": ""} | (env or {}))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_tokens_that_prepare_writes_are_shown_with_their_mask(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", [ROWS["thoughts"], ROWS["turns"] | {"id": "y"}, triplet(3)])
    report = json.loads(show(path, tokenizer, "--json", "--template", "chat"))
    prepare(path, tmp_path / "out", tokenizer, template="chat")
    data, decode = load_prepared(tmp_path / "out").train, load_tokenizer(tokenizer).decode
    assert [row["id"] for row in report["shown"]] == ["x", "y"]
    for row, shown in zip(data, report["shown"], strict=False):
        parts = {part["field"]: part for part in shown["parts"]}
        for name in ("prompt_short", "prompt_long", "chosen", "rejected"):
            assert parts[name]["tokens"] == [decode([token]) for token in row[name]]
        assert [parts[name]["counts"] for name in ("chosen", "rejected")] == [row["chosen_mask"], row["rejected_mask"]]
        assert not any(parts["prompt_long"]["counts"])


def test_the_page_can_be_read_without_colour(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", [ROWS["turns"]])
    plain = show(path, tokenizer)
    coloured = show(path, tokenizer, color=True)
    assert show(path, tokenizer, color=True, env={"NO_COLOR": "1"}) == plain
    assert "\x1b" not in plain and GREEN in coloured and YELLOW in coloured
    lines = [line.strip() for line in plain.splitlines()]
    kinds = [line.split("|")[0].strip() for line in lines if "|" in line]
    assert kinds == ["prompt", "prompt", "counts", "context", "counts", "counts"]
    counted = lines[lines.index(next(line for line in lines if line.startswith("chosen:"))) + 1]
    tokens = counted.removesuffix("|").split("|", 1)[1]
    assert tokens.replace("|", "") == "Where is it?<im_end>\\n"
    (context,) = [line for line in coloured.splitlines() if "context" in line]
    assert GREEN not in context


def test_a_long_prompt_is_cut_for_the_reader_alone(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", [triplet(3, long_words=400)])
    page = show(path, tokenizer)
    (long,) = [line for line in page.splitlines() if "tokens ..." in line]
    total = int(page.partition("prompt_long: ")[2].partition(" tokens")[0].replace(",", ""))
    assert f" ... {total - 48:,} tokens ... " in long and len(page) < 4000


def test_a_row_that_the_template_edits_is_shown_as_refused(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", [ROWS["tools"], ROWS["history"] | {"id": "y"}])
    page = show(path, tokenizer, "--chat-template-kwargs", '{"enable_thinking": false}')
    assert "row x (line 1)\n  refused: chosen: the chat template edits earlier turns" in page
    assert "row y (line 2)\n  prompt_short: " in page


def test_lost_text_is_a_note(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "qwen2_5", "qwen2_5")
    page = show(write_rows(tmp_path / "rows.jsonl", [ROWS["thoughts"]]), tokenizer)
    assert "  the template leaves out text of an answer: chosen: assistant 'I must ask.' is not in '<tool" in page


@pytest.mark.parametrize("options", [["--show", "1"], ["--tokenizer", "x"], ["--show", "0", "--tokenizer", "x"]])
def test_options_that_do_not_go_together(tmp_path, options):
    path = write_rows(tmp_path / "rows.jsonl", [triplet(0)])
    result = CliRunner().invoke(cli, ["data", "validate", str(path), *options])
    assert result.exit_code != 0 and "--show" in str(result.exception) + result.output

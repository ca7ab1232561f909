"""From questions to tokenized triplets, by the commands a user types."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_solopo.cli.main import main
from megatron_solopo.triplets.corpus.formats import normalise
from tests.generate.completion_server import completion_server
from tests.triplets.musique_example import first_lines, read, write


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    main([*map(str, arguments)])
    return capsys.readouterr().out


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_build_sample_select_validate_prepare(template, tokenizer_path, tmp_path, capsys, monkeypatch) -> None:
    source = write(tmp_path / "few.jsonl", first_lines(12))
    contexts, responses, triplets = (tmp_path / f"{name}.jsonl" for name in ("contexts", "responses", "triplets"))
    building = ["--long-tokens", "3000,4000", "--response-tokens", 200, "--template", template]
    told = run(
        capsys, "data", "build", "--input", source, "--output", contexts, "--tokenizer", tokenizer_path, *building
    )
    assert "24 rows written" in told and f"report: {tmp_path}/contexts.report/index.html" in told
    golds = {
        row["prompt_short"] if template == "plain" else row["prompt_short"][-1]["content"]: row["answers"][0]
        for row in read(contexts)
    }
    monkeypatch.setattr(
        "tests.generate.completion_server.text_of",
        lambda prompt, seed, choice: f"Step {choice}. So the answer is: {golds[prompt] if choice % 2 else 'nobody'}.",
    )
    with completion_server({1: "500"}) as server:
        sampling = ["--server", server.url, "--model", "m", "--num-samples", 4, "--backoff", 0.02]
        report = json.loads(
            run(capsys, "data", "sample", "--contexts", contexts, "--output", responses, *sampling, "--json")
        )
    assert report["responses"] == 48 and report["retried"] == {"HTTP 500": 1}
    selecting = ["--tokenizer", tokenizer_path, "--max-pairs-per-question", 2, "--max-length-ratio", 3]
    told = run(
        capsys, "data", "select", "--contexts", contexts, "--responses", responses, "--output", triplets, *selecting
    )
    assert "12 of them with pairs" in told and "triplets: 48" in told
    assert "no errors" in run(capsys, "data", "validate", triplets)
    for row in read(triplets):
        chosen, rejected = (
            row[name] if template == "plain" else row[name][0]["content"] for name in ("chosen", "rejected")
        )
        assert normalise(row["answers"][0]) in normalise(chosen) and rejected.endswith("nobody.")
    prepared = tmp_path / "prepared"
    limit = ["--max-length", 4000, "--eval-count", 4, "--json"]
    manifest = json.loads(
        run(capsys, "data", "prepare", "--input", triplets, "--output", prepared, "--tokenizer", tokenizer_path, *limit)
    )
    assert (manifest["kept"], manifest["train"], manifest["template"]) == (48, 44, template)


def test_all_mistakes_of_a_command_are_lines_that_begin_with_error(tokenizer_path, tmp_path, capsys) -> None:
    arguments = [
        "--input",
        tmp_path / "absent.jsonl",
        "--output",
        tmp_path / "out.jsonl",
        "--tokenizer",
        tokenizer_path,
    ]
    with pytest.raises(SystemExit) as exit_:
        run(capsys, "data", "build", *arguments, "--seed", -1)
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and len(lines) == 2 and all(line.startswith("error: ") for line in lines)


@pytest.mark.parametrize("command", ["build", "sample", "select"])
def test_help_shows_an_example_and_every_option_a_text(command, capsys) -> None:
    told = run(capsys, "data", command, "--help")
    assert "Example" in told and f"megatron-solopo data {command} --" in told
    from megatron_solopo.cli.data import data

    assert all(getattr(option, "help", None) for option in data.commands[command].params)


def test_the_shipped_answer_rules_still_make_triplets_at_once(tokenizer_path, tmp_path, capsys) -> None:
    source = write(tmp_path / "few.jsonl", first_lines(12))
    options = ["--long-tokens", 3000, "--responses", "constructed", "--json"]
    output = tmp_path / "triplets.jsonl"
    report = json.loads(
        run(capsys, "data", "build", "--input", source, "--output", output, "--tokenizer", tokenizer_path, *options)
    )
    assert report["rows_written"] == 12 and sum(report["rejected"].values()) == 12
    shutil.rmtree(Path(output).with_suffix(".report"))
    assert "12 rows of kind triplet, no errors" in run(capsys, "data", "validate", output)

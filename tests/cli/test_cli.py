"""What a user who makes a mistake sees: one line, a non-zero exit, and nothing half-written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from megatron_solopo.cli.main import cli, main
from megatron_solopo.errors import UserError
from tests.prepared import make_prepared, make_tokenizer, write_triplets
from tests.tiny_models import make_model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid model, tokenizer, triplet file, prepared directory and config."""
    path = tmp_path_factory.mktemp("world")
    make_model(path / "model", "qwen2")
    make_prepared(path / "prepared", rows=6, eval_count=0, seed=0)
    make_tokenizer(path / "tokenizer")
    write_triplets(path / "triplets.jsonl", rows=6, seed=0)
    write_config(path, {})
    return path


def write_config(path: Path, changes: dict[str, Any]) -> Path:
    values = {
        "run_dir": str(path / "run"),
        "model": {"path": str(path / "model")},
        "data": {"path": str(path / "prepared"), "max_tokens_per_pack": 400},
        "training": {"global_batch_size": 2, "max_steps": 1},
    }
    file = path / "config.yaml"
    file.write_text(yaml.safe_dump(values | changes))
    return file


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail; returns its one line of error."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    progress = ("Generating", "Tokenizing", "note: ", "Writing model shards")
    lines = capsys.readouterr().err.splitlines()
    error = [line for line in lines if line.strip() and not line.startswith(progress)]
    assert "Traceback" not in "\n".join(error)
    assert len(error) == 1, error
    return error[0]


TRAIN_MISTAKES: dict[str, tuple[list[str], dict[str, str], list[str]]] = {
    "unknown key": (["objective.alpa=3"], {}, ["unknown key objective.alpa", "objective.alpha"]),
    "budget below one triplet": (["data.max_tokens_per_pack=16"], {}, ["data.max_tokens_per_pack=16", "largest needs"]),
    "heads": (
        ["parallel.tensor_model_parallel_size=8"],
        {"WORLD_SIZE": "8"},
        ["tensor_model_parallel_size=8", "4 attention heads"],
    ),
    "layers": (
        ["parallel.pipeline_model_parallel_size=3"],
        {"WORLD_SIZE": "3"},
        ["4 layers", "3 pipeline stages", "pipeline_model_parallel_size"],
    ),
    "world size": (
        ["parallel.context_parallel_size=2"],
        {"WORLD_SIZE": "3", "RANK": "0"},
        ["3 processes", "context_parallel_size=2", "multiple of 2"],
    ),
    "data smaller than a batch": (["training.global_batch_size=7"], {}, ["6 triplets", "global batch of 7"]),
    "no held-out split": (["training.eval_steps=1"], {}, ["eval_steps=1", "--eval-count"]),
    "warm-up longer than the run": (["optimizer.lr_warmup_iters=5"], {}, ["lr_warmup_iters=5", "1 steps"]),
    "no model": (["model.path=/nowhere"], {}, ["/nowhere/config.json", "model.path"]),
    "no data": (["data.path=/nowhere"], {}, ["/nowhere", "data prepare"]),
    "more recomputed layers than there are": (
        ["parallel.recompute_granularity=full", "parallel.recompute_num_layers=9"],
        {},
        ["recompute_num_layers=9", "4 layers"],
    ),
    "run_dir below a file": (["run_dir=/etc/passwd/run"], {}, ["run_dir=/etc/passwd/run", "not a directory"]),
    "transformer engine without it": (
        ["model.implementation=transformer_engine"],
        {},
        ["implementation=transformer_engine", "auto or local"],
    ),
}


@pytest.mark.parametrize("mistake", TRAIN_MISTAKES)
def test_train_refuses(
    mistake: str, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, environment, expected = TRAIN_MISTAKES[mistake]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = fails(capsys, "train", "--config", str(world / "config.yaml"), *overrides)
    for part in expected:
        assert part in line
    assert not (world / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model_type": "gpt_neox"},
            ["model_type='gpt_neox'", "llama, mistral, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe"],
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            ["rope_type='dynamic'", "default, linear, llama3, yarn"],
        ),
    ],
    ids=["model type", "rope type"],
)
def test_train_refuses_a_model_it_does_not_know(
    changes: dict[str, Any], expected: list[str], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    line = fails(capsys, "train", "--config", str(world / "config.yaml"), f"model.path={tmp_path / 'model'}")
    for part in (*expected, str(file)):
        assert part in line


def test_solopo_on_plain_pairs_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "w5 w6", "chosen": "w7", "rejected": "w8"}
    pairs.write_text("".join(json.dumps(row | {"prompt": f"w5 w{n}"}) + "\n" for n in range(6, 10)))
    arguments = ["--tokenizer", str(world / "tokenizer"), "--output", str(tmp_path / "pairs")]
    main(["data", "prepare", "--input", str(pairs), *arguments])
    capsys.readouterr()
    config = ["--config", str(world / "config.yaml"), f"data.path={tmp_path / 'pairs'}"]
    assert "objective.name=solopo" in fails(capsys, "train", *config)
    main(["train", *config, "objective.name=short_po", f"run_dir={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1


def test_nothing_of_the_users_is_overwritten(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = tmp_path / "cache"
    precious.mkdir()
    (precious / "thesis.tex").write_text("...")
    by_hand = tmp_path / "by_hand" / "config.yaml"
    by_hand.parent.mkdir()
    by_hand.write_text("# my notes\n" + (world / "config.yaml").read_text())
    assert "move it" in fails(capsys, "train", "--config", str(by_hand), f"run_dir={by_hand.parent}")
    assert by_hand.read_text().startswith("# my notes")
    assert [path.name for path in by_hand.parent.iterdir()] == ["config.yaml"]
    config = ["train", "--config", str(world / "config.yaml"), f"run_dir={tmp_path / 'run'}"]
    assert "reference.cache" in fails(capsys, *config, f"reference.cache={precious}")
    assert [path.name for path in precious.iterdir()] == ["thesis.tex"]
    main(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert "checkpoint.resume=false" in fails(capsys, *config, "checkpoint.resume=false")
    main(config)  # all steps are done: nothing to do, nothing lost
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert "all 1 steps are done" in capsys.readouterr().out


def test_data_of_another_tokenizer_or_beyond_the_models_positions_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", "llama3")
    shutil.copytree(world / "tokenizer", other, dirs_exist_ok=True)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w5"], vocabulary["w6"] = vocabulary["w6"], vocabulary["w5"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = ["train", "--config", str(world / "config.yaml"), f"run_dir={tmp_path / 'run'}"]
    assert "not the tokenizer of the model" in fails(capsys, *config, f"model.path={other}")
    short = shutil.copytree(world / "model", tmp_path / "short")
    fields = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 32}
    (short / "config.json").write_text(json.dumps(fields))
    line = fails(capsys, *config, f"model.path={short}")
    assert "32 positions" in line and "max_position_embeddings" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--confg", "c.yaml"], "error: No such option '--confg'"),
        (
            ["convert", "import", "--hf", "a"],
            "error: Missing option '--out'; see megatron-solopo convert import --help",
        ),
        (
            ["convert", "export", "--checkpoint", "a", "--out", "b", "--adapter", "--verify", "full"],
            "error: --verify: --adapter compares the checksums of the checkpoint alone; leave --verify out",
        ),
        (["trian"], "error: No such command 'trian'"),
        (["train", "--debug"], "error: No such option '--debug'; --debug goes before the command"),
    ],
)
def test_a_command_line_that_is_wrong_is_one_line_too(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(capsys, *arguments).startswith(expected)


def add_command(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Add the command `fail`, which runs `action`."""
    monkeypatch.setitem(cli.commands, "fail", click.Command("fail", callback=action))


def raise_error(error: Exception) -> Callable[[], object]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("action", "line"),
    [
        (raise_error(UserError("alpha=-1: must be positive")), "error: alpha=-1: must be positive"),
        (lambda: Path("/nowhere/file").read_text(), "error: /nowhere/file: No such file or directory"),
    ],
    ids=["user error", "operating system"],
)
def test_what_a_user_can_mend_is_one_line_and_debug_adds_the_traceback(
    action: Callable[[], object], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_command(monkeypatch, action)
    assert fails(capsys, "fail") == line
    with pytest.raises(SystemExit) as exit_:
        main(["--debug", "fail"])
    shown = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and shown[0].startswith("Traceback") and shown[-1] == line


@pytest.mark.parametrize(
    "words",
    [
        "[pair.cc:537] Read error [127.0.0.1]:25754: Connection reset by peer. This is typically caused by a remote",
        "[pair.cc:553] Connection closed by peer [10.0.0.1]:9",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_a_rank_that_lost_another_says_that_the_other_is_the_cause(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add_command(monkeypatch, raise_error(RuntimeError(words)))
    with pytest.raises(RuntimeError) as raised:
        main(["fail"])
    (note,) = raised.value.__notes__
    assert "lost its connection to another rank" in note and "SIGKILL" in note and "out-of-memory killer" in note
    add_command(monkeypatch, raise_error(RuntimeError("a matrix has the wrong shape")))
    with pytest.raises(RuntimeError) as raised:
        main(["fail"])
    assert not hasattr(raised.value, "__notes__")


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (lambda: list(zip("ab", "a", strict=True)), ValueError),
        (lambda: int("many"), ValueError),
        (lambda: {}["key"], KeyError),
        (raise_error(OSError("no file is named")), OSError),
    ],
    ids=["zip", "int", "key", "operating system"],
)
def test_any_other_error_keeps_its_traceback(
    action: Callable[[], object], kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_command(monkeypatch, action)
    with pytest.raises(kind):
        main(["fail"])


@pytest.mark.parametrize("debug", [False, True])
def test_debug_is_an_option_of_the_module_too(debug: bool, tmp_path: Path) -> None:
    arguments = ["--debug"] * debug + ["train", "--config", str(tmp_path / "absent.yaml")]
    done = subprocess.run([sys.executable, "-m", "megatron_solopo", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and ("Traceback" in done.stderr) is debug
    assert done.stderr.splitlines()[-1].endswith("absent.yaml: cannot read the config: No such file or directory")


BAD_LINES = {
    "missing field": (b'{"id": "a", "prompt_short": "w1", "prompt_long": "w2 w3", "chosen": "w4"}', "rejected"),
    "empty response": (
        b'{"id": "a", "prompt_short": "w1", "prompt_long": "w2", "chosen": "", "rejected": "w5"}',
        "chosen",
    ),
    "not UTF-8": (b'{"id": "\xff\xfe"}', "UTF-8"),
    "not JSON": (b'{"id": ', "JSON"),
}


@pytest.mark.parametrize("mistake", BAD_LINES)
def test_bad_rows_are_refused_by_line_and_nothing_is_written(
    mistake: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, reason = BAD_LINES[mistake]
    source = tmp_path / "bad.jsonl"
    source.write_bytes((world / "triplets.jsonl").read_bytes() + bad + b"\n")
    output = tmp_path / "prepared"
    arguments = ["--input", str(source), "--output", str(output), "--tokenizer", str(world / "tokenizer")]
    line = fails(capsys, "data", "prepare", *arguments)
    assert "data validate" in line and reason in line
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    with pytest.raises(SystemExit) as exit_:
        main(["data", "validate", str(source)])
    assert exit_.value.code == 1
    assert f"{source}:7: " in capsys.readouterr().out


def test_a_row_longer_than_allowed_is_refused_or_dropped_and_counted(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "prepared"
    arguments = ["data", "prepare", "--input", str(world / "triplets.jsonl"), "--output", str(output)]
    arguments += ["--tokenizer", str(world / "tokenizer"), "--max-length", "50"]
    assert "--max-length" in fails(capsys, *arguments)
    assert not output.exists()
    main([*arguments, "--overlong", "drop"])
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["dropped"]["overlong"] == 6 - manifest["kept"] > 0


def test_doctor_reports_for_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert {"torch", "megatron-core", "gloo", "transformer-engine"} <= {check["name"] for check in report["checks"]}
    main(["doctor"])
    assert "megatron-core" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("", "megatron-solopo train --config c.yaml"),
        ("doctor", "megatron-solopo doctor"),
        ("data", "prepare"),
        ("data build", "megatron-solopo data build --input"),
        ("data validate", "megatron-solopo data validate triplets.jsonl"),
        ("data prepare", "megatron-solopo data prepare --input"),
        ("reference", "-m megatron_solopo reference --config c.yaml"),
        ("train", "-m megatron_solopo train --config c.yaml"),
        ("evaluate preference", "megatron-solopo evaluate preference --model runs/first"),
        ("report", "megatron-solopo report runs/solopo runs/long_po --output report"),
    ],
)
def test_every_command_has_help_with_an_example(command: str, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert f"Usage: megatron-solopo {command}".rstrip() in text and example in text


def test_help_answers_without_importing_torch() -> None:
    script = "import sys; from megatron_solopo.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0

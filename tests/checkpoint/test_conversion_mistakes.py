"""What a user of the three commands does wrong, or is unlucky with: one line in the user's terms."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_solopo.checkpoint import conversion
from megatron_solopo.checkpoint.conversion import export_model, import_model, verify_models
from megatron_solopo.checkpoint.huggingface_weights import INDEX
from megatron_solopo.cli.main import main
from tests.conversions import QUERY, WEIGHTS, change, change_config, refusal
from tests.prepared import make_tokenizer


@pytest.fixture
def run(folder: Path) -> Path:
    """A run directory with checkpoints 9 and 10."""
    for step in (10, 9):
        shutil.copytree(folder / "megatron", folder / "run" / "checkpoints" / f"iter_{step:07d}")
    return folder / "run"


def refused_import(folder: Path, source: Path, out: str = "out") -> str:
    return refusal(folder, lambda: import_model(source, folder / out, verification="none"))


def refused_export(folder: Path, checkpoint: Path, out: str = "out") -> str:
    return refusal(folder, lambda: export_model(checkpoint, folder / out, dtype=None, verification="none"))


def refused_verify(folder: Path, hf: Path, checkpoint: Path) -> str:
    return refusal(folder, lambda: verify_models(hf, checkpoint, logits=False))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nothere", "no such directory (names of a hub are not downloaded)"),
        ("hf/config.json", "is a file"),
        ("megatron", "is a Megatron checkpoint already"),
        ("megatron/huggingface", "is a folder of the Megatron checkpoint"),
        ("run", "holds no config.json"),
    ],
)
def test_what_is_no_hugging_face_directory(path: str, words: str, folder: Path, run: Path) -> None:
    for message in (
        refused_import(folder, folder / path),
        refused_verify(folder, folder / path, run / "checkpoints" / "iter_0000009"),
    ):
        assert message.startswith(f"--hf={folder / path}: {words}")


@pytest.mark.parametrize(
    ("path", "words", "end"),
    [
        ("run", "is no complete Megatron checkpoint", "did you mean {}/run/checkpoints/iter_0000010?"),
        ("run/checkpoints", "is no complete Megatron checkpoint", "did you mean {}/run/checkpoints/iter_0000010?"),
        ("run/checkpoints/iter_0000011", "no such directory", "checkpoints holds iter_0000009, iter_0000010"),
        ("run/checkpoints/iter_0000010/huggingface", "is a folder of", "did you mean {}/run/checkpoints/iter_0000010?"),
        ("hf", "is a Hugging Face directory", ".metadata and metadata.json"),
        ("hf/config.json", "is a file", "not a directory"),
        ("nothere", "no such directory", "directory"),
    ],
)
def test_what_is_no_checkpoint(path: str, words: str, end: str, folder: Path, run: Path) -> None:
    for message in (refused_export(folder, folder / path), refused_verify(folder, folder / "hf", folder / path)):
        assert message.startswith(f"--checkpoint={folder / path}: {words}") and message.endswith(end.format(folder))


def test_an_adapter_without_its_model(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    for refused, option in ((refused_import, "--hf"), (refused_export, "--checkpoint")):
        message = refused(folder, folder / "adapter")
        assert message.startswith(f"{option}={folder / 'adapter'}: holds an adapter of PEFT without its model; name")


def test_verify_with_its_arguments_exchanged(folder: Path) -> None:
    assert refused_verify(folder, folder / "megatron", folder / "hf").endswith("exchange the two")


def test_an_output_that_is_a_broken_link_or_lies_in_its_source(folder: Path) -> None:
    (folder / "link").symlink_to("gone")
    for refused, name in ((refused_import, "hf"), (refused_export, "megatron")):
        assert "link: is a link to gone, which does not exist" in refused(folder, folder / name, "link")
        message = refused(folder, folder / name, f"{name}/sub/out")
        assert f"sub/out: lies inside {folder / name}" in message and "--out" in message
        assert not (folder / name / "sub").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_named(value: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(folder / "hf" / WEIGHTS, lambda each: each[QUERY][3].fill_(value))
    shutil.rmtree(folder / "megatron")
    assert refused_import(folder, folder / "hf").startswith(f"{folder / 'hf' / WEIGHTS}: {QUERY} is not finite")
    with monkeypatch.context() as patch:
        patch.setattr(conversion.SafetensorsDirectory, "read_finite", conversion.SafetensorsDirectory.read)
        import_model(folder / "hf", folder / "megatron", verification="none")
    assert refused_export(folder, folder / "megatron").startswith(f"{folder / 'megatron'}: {QUERY} is not finite")
    report = verify_models(folder / "hf", folder / "megatron", logits=True)
    assert report.failures == [f"not finite (NaN or infinity): {QUERY} in {folder / 'hf' / WEIGHTS}"]
    assert dict(report.rows)["logits"] == "skipped: the tensors differ or are damaged"
    change(folder / "hf" / WEIGHTS, lambda each: each[QUERY].fill_(1.0))
    failures = verify_models(folder / "hf", folder / "megatron", logits=True).failures
    assert failures[1] == f"not finite (NaN or infinity): {QUERY} in {folder / 'megatron'}"


def test_a_model_that_transformers_cannot_load_is_a_failure(folder: Path) -> None:
    change_config(folder / "hf", attention_dropout="much")
    report = verify_models(folder / "hf", folder / "megatron", logits=True)
    (failure,) = report.failures
    assert failure.startswith(f"{folder / 'hf'}: transformers cannot load it: ") and "attention_dropout" in failure
    assert "FAILED" in dict(report.rows)["loaded"] and "logits" not in dict(report.rows)


def test_quantized_models_are_refused_by_every_command(folder: Path) -> None:
    for config in (folder / "hf", folder / "megatron" / "huggingface"):
        change_config(config, quantization_config={"quant_method": "bitsandbytes"})
    for message in (
        refused_import(folder, folder / "hf"),
        refused_export(folder, folder / "megatron"),
        refused_verify(folder, folder / "hf", folder / "megatron"),
    ):
        assert "config.json: quantization_config with quant_method='bitsandbytes' is not supported" in message


def test_verify_shows_both_values_of_a_field(folder: Path) -> None:
    change_config(folder / "hf", rms_norm_eps=1e-5)
    (failure,) = verify_models(folder / "hf", folder / "megatron", logits=False).failures
    assert failure.endswith("differs in layernorm_epsilon (1e-05 in Hugging Face, 1e-06 in the checkpoint)")


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/other.safetensors", "sub/../../other.safetensors"])
def test_an_index_that_points_out_of_the_directory_is_refused(shard: str, folder: Path) -> None:
    (folder / "hf" / WEIGHTS).rename(folder / "other.safetensors")
    (folder / "hf" / INDEX).write_text(f'{{"weight_map": {{"{QUERY}": "{shard}"}}}}')
    assert f"names {shard} as the file of {QUERY}, which is outside the directory" in refused_import(
        folder, folder / "hf"
    )


def test_a_missing_tokenizer_is_in_the_report(folder: Path) -> None:
    found = dict(import_model(folder / "hf", folder / "one", verification="none").rows)
    assert found["files"] == f"no tokenizer files in {folder / 'hf'}: the export will have none"
    make_tokenizer(folder / "hf")
    assert "files" not in dict(import_model(folder / "hf", folder / "two", verification="none").rows)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["import", "export"])
def test_an_interrupted_command_is_one_line_and_leaves_nothing(
    command: str, number: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGATRON_SOLOPO_DEVICE", "cpu")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    before = sorted(path.name for path in folder.iterdir())
    signals = iter([number])

    def interrupt(*arguments: Any) -> None:
        for each in signals:
            os.kill(os.getpid(), each)

    monkeypatch.setattr(conversion.tqdm, "update", interrupt)
    source = ["--hf", str(folder / "hf")] if command == "import" else ["--checkpoint", str(folder / "megatron")]
    with pytest.raises(SystemExit) as exit_:
        main(["convert", command, *source, "--out", str(folder / "out"), "--verify", "tensors"])
    assert exit_.value.code == f"interrupted: {folder / 'out'} was not written; run the same command again"
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_an_interruption_after_the_end_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_SOLOPO_DEVICE", "cpu")

    def interrupted(source: Path, output: Path, **more: Any) -> None:
        import_model(source, output, verification="none")
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "import_model", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["convert", "import", "--hf", str(folder / "hf"), "--out", str(folder / "out")])
    assert str(exit_.value.code).startswith(f"interrupted: {folder / 'out'} is complete")


def test_the_help_says_what_passes_and_what_a_kill_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", "verify", "--help"])
    assert "after rounding to" in " ".join(capsys.readouterr().out.split())
    main(["convert", "--help"])
    assert ".OUT.incomplete-*" in capsys.readouterr().out


def test_under_torchrun_one_rank_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["convert", "verify", "--hf", "a", "--checkpoint", "b"])
    assert capsys.readouterr().err == "error: convert runs as one process; start it without torchrun\n"

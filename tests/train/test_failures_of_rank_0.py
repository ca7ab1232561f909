"""What only rank 0 reads or writes: if that fails, every rank ends at once with the same line, and none waits."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (imported once, before ranks are forked)

from megatron_solopo.cli.main import main
from megatron_solopo.config import Config
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate import long_context
from megatron_solopo.evaluation_settings import LongContextSettings
from megatron_solopo.train import metrics, saving, trainer
from tests.distributed import exit_codes, run_distributed
from tests.train.runs import at_call, make_inputs, small_config

# A wait for another rank would last until its timeout, which is 10 minutes.
MOST_SECONDS = 60


def config(folder: Path, name: str, **sections: Any) -> Config:
    training = {"global_batch_size": 4, "max_steps": 1}
    sections |= {"training": training, "objective": {"loss_type": "simpo"}, "optimizer": {"lr": 1e-3}}
    return small_config(folder, name, {}, **sections)


def fails() -> None:
    raise OSError(28, "No space left on device", "a-file")


def metrics_file_is_a_directory(folder: Path) -> None:
    (folder / "metrics" / "metrics.jsonl").mkdir(parents=True, exist_ok=True)
    trainer.train(config(folder, "metrics"))


def skips_file_is_a_directory(folder: Path) -> None:
    (folder / "skips" / "skipped_steps.jsonl").mkdir(parents=True, exist_ok=True)
    with mock.patch.object(trainer, "mixture_loss", not_finite(trainer.mixture_loss)):
        trainer.train(config(folder, "skips"))


def not_finite(original: Callable[..., Any]) -> Callable[..., Any]:
    """The loss of every pack becomes NaN."""

    def changed(*arguments: Any, **keywords: Any) -> Any:
        inner = original(*arguments, **keywords)

        def loss(microbatch: Any) -> Any:
            def function(output: torch.Tensor) -> Any:
                value, count, report = inner(microbatch)(output)
                return value * torch.nan, count, report * torch.nan

            return function

        return loss

    return changed


def tensorboard_is_a_file(folder: Path) -> None:
    if dist.get_rank() == 0:
        (folder / "board").mkdir()
        (folder / "board" / "tensorboard").touch()
    dist.barrier()
    trainer.train(config(folder, "board", logging={"tensorboard": True}))


def model_files_cannot_be_read(folder: Path) -> None:
    with at_call(saving, "read_model_files", 1, 0, fails):
        trainer.train(config(folder, "model_files"))


def config_cannot_be_written(folder: Path) -> None:
    with at_call(trainer, "save_config", 1, 0, fails):
        trainer.train(config(folder, "config"))


def picture_cannot_be_written(folder: Path) -> None:
    with at_call(metrics, "plot_metrics", 1, 0, fails):
        trainer.train(config(folder, "picture"))


def journal_is_a_directory(folder: Path) -> None:
    evaluate(folder, "directory")


def answer_cannot_be_written(folder: Path) -> None:
    with at_call(long_context, "_stored", 1, 0, fails):
        evaluate(folder, "full")


def evaluate(folder: Path, name: str) -> None:
    output = folder / "evaluation" / f"{name}.json"
    if name == "directory":
        output.with_suffix(".responses.jsonl").mkdir(parents=True, exist_ok=True)
    long_context.evaluate_long_context(
        LongContextSettings(
            model=str(folder / "model"),
            tokenizer=str(folder / "prepared.tokenizer"),
            output=output,
            tasks=("needle_single",),
            lengths=(200,),
            depths=(0.5,),
            samples=2,
            max_new_tokens=4,
            backend="megatron",
        )
    )


CASES: dict[Callable[[Path], None], str] = {
    metrics_file_is_a_directory: "metrics/metrics.jsonl: Is a directory",
    skips_file_is_a_directory: "skips/skipped_steps.jsonl: Is a directory",
    tensorboard_is_a_file: "board/tensorboard: ",
    model_files_cannot_be_read: "a-file: No space left on device",
    config_cannot_be_written: "a-file: No space left on device",
    picture_cannot_be_written: "a-file: No space left on device",
    journal_is_a_directory: "evaluation/directory.responses.jsonl: Is a directory",
    answer_cannot_be_written: "a-file: No space left on device",
}


def run_all(folder: Path) -> dict[str, tuple[str, float]]:
    """On every rank: what each case raises, and after how many seconds."""
    found = {}
    for case in CASES:
        started = time.monotonic()
        with pytest.raises(UserError) as error:
            case(folder)
        found[case.__name__] = (str(error.value), time.monotonic() - started)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("rank_0"), eval_count=0)


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, tuple[str, float]]]:
    return run_distributed(run_all, 2, folder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_rank_ends_with_the_same_line(found: list[dict[str, tuple[str, float]]], case: Any) -> None:
    first, second = (rank[case.__name__] for rank in found)
    assert CASES[case] in first[0] and "\n" not in first[0]
    assert first[0] == second[0]
    assert max(first[1], second[1]) < MOST_SECONDS


def command(folder: Path) -> None:
    """The command line, with what it prints as errors in a file."""
    with (folder / f"errors-{dist.get_rank()}").open("w") as stream, contextlib.redirect_stderr(stream):
        main(["train", "--config", str(folder / "command.yaml")])


def test_the_command_exits_with_2_and_one_line_on_every_rank(folder: Path) -> None:
    (folder / "command" / "metrics.jsonl").mkdir(parents=True)
    values = config(folder, "command").model_dump(mode="json", exclude_defaults=True)
    (folder / "command.yaml").write_text(json.dumps(values))  # JSON is YAML too
    assert exit_codes(command, 2, folder, patience=3 * MOST_SECONDS) == [2, 2]
    errors = [(folder / f"errors-{rank}").read_text().splitlines() for rank in range(2)]
    line = f"error: {folder}/command/metrics.jsonl: Is a directory"
    assert [[each for each in lines if "error:" in each] for lines in errors] == [[line], [f"[rank 1] {line}"]]
    assert not any("Traceback" in each for lines in errors for each in lines)

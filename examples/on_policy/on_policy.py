"""Rounds of: sample from the newest model, select, train, export, evaluate. Each step is a command of this package.

A round leaves its files in WORK/round_N, and round.json tells how each was made.
"""

import fcntl
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from model_server import SERVED_NAME, Server, serving
from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tied_process import have_ended, tied_process, wait_for_end
from tqdm import tqdm

from megatron_solopo.checkpoint.fingerprint import weights_fingerprint
from megatron_solopo.cli.main import cli
from megatron_solopo.config.load import as_override, dotted, parse_config, read_values
from megatron_solopo.errors import UserError, describe_problem
from megatron_solopo.files import atomic_path, remove, sha256_file
from megatron_solopo.results.long_context import read_long_context
from megatron_solopo.run_directory import find_subject

RECORD, TRAIN_CONFIG = "round.json", "train.yaml"
_OTHER_EVALUATION = "take the old ones again, or set evaluate=null and evaluate the models by hand"
"""Advice that costs no round, because no later step depends on an evaluation."""


class Options(BaseModel):
    """Options of a command, by name: `num_samples: 16` becomes `--num-samples 16`."""

    model_config = ConfigDict(extra="allow")

    def named(self) -> dict[str, Any]:
        """The values by name."""
        return self.model_extra or {}

    def as_arguments(self, section: str, **given: Any) -> list[str]:
        """Arguments of the command line. `given` are those that the loop sets: an error if the section has one too."""
        for name in sorted(self.named().keys() & given.keys()):
            raise UserError(f"{section}.{name}: the loop sets it; remove it")
        arguments: list[str] = []
        for name, value in (self.named() | given).items():
            flag = f"--{name.replace('_', '-')}"
            arguments += [flag] if value is True else [flag, value if isinstance(value, str) else json.dumps(value)]
        return arguments


class Settings(BaseModel):
    """The file of a loop. All paths are relative to where the loop is started."""

    model_config = ConfigDict(extra="forbid")
    work: Path
    """Folder of the rounds."""
    model: Path
    """Hugging Face directory that the first round samples from and trains."""
    contexts: Path
    """Output of `data build`."""
    rounds: int = Field(default=2, ge=1)
    seed: int = 0
    """Round N samples, selects and trains with seed + N."""
    server: Server | None = None
    """Answers `data sample`. null: the model runs in the process of `data sample`."""
    launch: str = "python -m"
    """What starts the ranks of `train`, such as torchrun --standalone --nproc-per-node 8 -m."""
    sample: Options = Options()
    select: Options = Options()
    prepare: Options = Options()
    train: dict[str, Any] = {}
    """Configuration of `train` without run_dir, seed, model.path and data.path."""
    evaluate: Options | None = None
    """Options of `evaluate long-context`. null: no evaluation."""

    @property
    def lock(self) -> Path:
        """Of all commands that the loop starts, see `tied_process`."""
        return self.work / "commands.lock"


def read_settings(path: Path, overrides: tuple[str, ...]) -> Settings:
    """Read the file and dotted overrides. Raises UserError with one line per mistake."""
    try:
        return Settings.model_validate(read_values(path, overrides))
    except ValidationError as error:
        lines = [f"{path}: {describe_problem(detail, 'the whole file')}" for detail in error.errors()]
        raise UserError("\n".join(lines)) from None


@dataclass
class Step:
    """A command of a round, and what it writes."""

    name: str
    command: list[str]
    output: Path
    config: dict[str, Any] | None = None
    """Of the training: what the file says that the command names."""
    server: str | None = None
    """Command of the server that answers. It decides the answers as much as the options do."""

    @property
    def record(self) -> dict[str, Any]:
        """How it is made."""
        others = {"config": self.config, "server": self.server}
        return {"command": self.command} | {name: value for name, value in others.items() if value is not None}


@dataclass
class Round:
    """Folder and record of a round."""

    number: int
    folder: Path
    policy: Path
    """The model that answers and is trained."""
    record: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        path = self.folder / RECORD
        start = {"round": self.number, "policy": str(self.policy), "steps": {}}
        self.record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else start

    def is_done(self, steps: Sequence[Step]) -> bool:
        """Whether the first of the steps has been carried out, and its output is there or no step reads it any more.

        An error if it was carried out by another command.
        """
        step, *later = steps
        found = self.record["steps"].get(step.name)
        if found is None:
            return False
        was, now = _by_name(found), _by_name(step.record)
        if "server" not in found:  # rounds of older versions do not record it
            now.pop("server.command", None)
        if changes := list(_changes(was, now)):
            advice = f"choose another `work`, or remove {self.folder} and all later rounds"
            if step.name == "evaluate":
                advice = _OTHER_EVALUATION
            raise click.ClickException(
                f"{self.folder / RECORD}: the settings of {step.name} have changed since it ran: {', '.join(changes)}; "
                f"{advice}"
            )
        # Each step reads what the one before wrote. The next round, too, reads what `export` wrote.
        is_read_again = step.name == "export" or not later or not self.is_done(later)
        return step.output.exists() or not is_read_again

    def forget(self, steps: Sequence[Step]) -> None:
        """Remove the records of steps: what one of them reads is made again."""
        for step in steps:
            self.record["steps"].pop(step.name, None)
        self._write()

    def check_inputs(self, files: Mapping[str, Path]) -> None:
        """Record fingerprints of the model that answers and of files, by their keys. An error if one has changed."""
        began = f"began with other weights (of {self.record['policy']}) than {self.policy} has now"
        anew = f"choose another `work`, or remove {self.folder} and all later rounds"
        self._check_same("policy_weights", weights_fingerprint(self.policy), f"{began}; {anew}")
        for key, path in files.items():
            advice = _OTHER_EVALUATION if key.startswith("evaluate.") else f"take the old one again, {anew}"
            self._check_same(f"{key}_sha256", sha256_file(path), f"began with another {key}={path}; {advice}")
        self._write()  # before any answer, because a server does not tell whose answers it gives

    def _check_same(self, key: str, found: str, problem: str) -> None:
        if self.record.setdefault(key, found) != found:
            raise click.ClickException(f"{self.folder / RECORD}: the round {problem}")

    def keep(self, step: Step, seconds: float) -> None:
        """Record that the step has been carried out."""
        self.record["steps"][step.name] = step.record | {"seconds": round(seconds, 1)}
        self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.folder / RECORD) as temporary:
            temporary.write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")


def _by_name(record: dict[str, Any]) -> dict[str, Any]:
    """A step's record by names: options of the command, its other words, the server, and keys of the config."""
    found: dict[str, Any] = {}
    name = "command"
    for word in record["command"]:
        if word.startswith("--"):
            name = word
            found.setdefault(word, True)  # until its value follows; an option may stand twice
        else:
            found[name] = word if found.get(name, True) is True else f"{found[name]} {word}"
    server = {"server.command": record["server"]} if "server" in record else {}
    return found | server | dict(dotted(record.get("config", {})))


def _changes(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs between two records by names."""
    for name in dict.fromkeys([*now, *was]):
        if name not in was or name not in now or was[name] != now[name]:
            before, after = (as_override(each[name]) if name in each else "not set" for each in (was, now))
            yield f"{name}={after} (it was {before})"


def make_rounds(settings: Settings) -> Iterator[tuple[Round, list[Step]]]:
    """The rounds in order. Round 0 evaluates the model as it came."""
    policy = settings.model
    if settings.evaluate is not None:
        start = Round(0, settings.work / "round_0", policy)
        yield start, [_evaluation(settings, start, policy)]
    for number in range(1, settings.rounds + 1):
        each = Round(number, settings.work / f"round_{number}", policy)
        trained = each.folder / "model"
        steps = [*_data(settings, each), *_training(settings, each, trained)]
        if settings.evaluate is not None:
            steps.append(_evaluation(settings, each, trained))
        yield each, steps
        policy = trained


def _data(settings: Settings, each: Round) -> list[Step]:
    """Answers of the policy, and pairs of them."""
    contexts, seed = str(settings.contexts), settings.seed + each.number
    responses, triplets, prepared = (each.folder / name for name in ("responses.jsonl", "triplets.jsonl", "prepared"))
    asked = {"model": str(each.policy)}
    if settings.server is not None:
        asked = {"model": SERVED_NAME, "server": settings.server.url}
    tokenizer = str(settings.model)
    sample = settings.sample.as_arguments("sample", contexts=contexts, output=str(responses), seed=seed, **asked)
    select = settings.select.as_arguments(
        "select",
        contexts=contexts,
        responses=str(responses),
        output=str(triplets),
        tokenizer=tokenizer,
        seed=seed,
        overwrite=True,
    )
    prepare = settings.prepare.as_arguments(
        "prepare",
        input=str(triplets),
        output=str(prepared),
        tokenizer=tokenizer,
        seed=settings.seed,
        overwrite=True,
    )
    data, server = ["megatron-solopo", "data"], settings.server.command if settings.server else None
    return [
        Step("sample", [*data, "sample", *sample], responses, server=server),
        Step("select", [*data, "select", *select], triplets),
        Step("prepare", [*data, "prepare", *prepare], prepared),
    ]


def _training(settings: Settings, each: Round, trained: Path) -> list[Step]:
    """Training of the policy on its own pairs, and the Hugging Face directory of the result."""
    run, config = each.folder / "run", each.folder / TRAIN_CONFIG
    own: dict[str, Any] = {
        "run_dir": str(run),
        "seed": settings.seed + each.number,
        "model": {"path": str(each.policy)},
        "data": {"path": str(each.folder / "prepared")},
    }
    for key, _ in dotted(own):
        if OmegaConf.select(OmegaConf.create(settings.train), key) is not None:
            raise UserError(f"train.{key}: the loop sets it; remove it")
    merged: Any = OmegaConf.to_container(OmegaConf.merge(settings.train, own))
    train = [*shlex.split(settings.launch), "megatron_solopo", "train", "--config", str(config)]
    export = ["megatron-solopo", "convert", "export", "--checkpoint", str(run), "--out", str(trained)]
    return [Step("train", train, run, merged), Step("export", export, trained)]


def _evaluation(settings: Settings, each: Round, model: Path) -> Step:
    assert settings.evaluate is not None
    output = each.folder / "evaluation.json"
    arguments = settings.evaluate.as_arguments("evaluate", model=str(model), output=str(output))
    return Step("evaluate", ["megatron-solopo", "evaluate", "long-context", *arguments], output)


def input_files(settings: Settings, each: Round) -> dict[str, Path]:
    """Files that a round reads and the loop did not write, by their keys. Round 0 only evaluates."""
    return ({} if each.number == 0 else {"contexts": settings.contexts}) | _evaluated_files(settings)


def _evaluated_files(settings: Settings) -> dict[str, Path]:
    options = settings.evaluate.named() if settings.evaluate is not None else {}
    names = ("contexts", "corpus", "haystack", "prompt_template")
    return {f"evaluate.{name}": Path(str(options[name])) for name in names if name in options}


def carry_out(settings: Settings, each: Round, step: Step) -> None:
    """Run a step's command in a log of its own, and record it. An error ends the loop and shows the log's end."""
    command = list(step.command)
    if step.config is not None:
        with atomic_path(each.folder / TRAIN_CONFIG) as temporary:
            OmegaConf.save(OmegaConf.create(step.config), temporary)
        # An earlier training of this round may have left answers of its model.
        remove(each.folder / "evaluation.responses.jsonl")
    if step.name == "export":
        remove(step.output)  # a killed loop may have left it without a record
        place = command.index("--checkpoint") + 1
        command[place] = str(find_subject(Path(command[place]), "--checkpoint").path)  # the run's newest
    log, started = each.folder / f"{step.name}.log", time.monotonic()
    with (
        _server(settings, each, step) as server,
        log.open("a", encoding="utf-8") as stream,
        tied_process(command, settings.lock, stream) as process,
    ):
        code = process.wait()
        gone = "" if server is None or server.poll() is None else f"; the server ended with code {server.returncode}"
    if code:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-10:])
        raise click.ClickException(f"{shlex.join(command)}: exit code {code}{gone}; the end of {log}:\n{end}")
    each.keep(step, time.monotonic() - started)


def _server(settings: Settings, each: Round, step: Step) -> AbstractContextManager["subprocess.Popen[bytes] | None"]:
    """The process of the server while the step runs; None where the step asks no server."""
    if settings.server is None or step.name != "sample":
        return nullcontext()
    key = settings.sample.named().get("api_key_env")
    return serving(settings.server, each.policy, settings.lock, each.folder / "server.log", key)


def summary(settings: Settings) -> str:
    """A line per round: triplets, seconds, and the mean score of each task."""
    lines = []
    for each, steps in make_rounds(settings):
        triplets = each.folder / "triplets.jsonl"
        count = len(triplets.read_text(encoding="utf-8").splitlines()) if triplets.exists() else 0
        seconds = sum(found["seconds"] for found in each.record["steps"].values())
        scores = ""
        if steps[-1].name == "evaluate" and steps[-1].output.exists():
            results = read_long_context(steps[-1].output)
            cells = {task: results.cell(task, metric) for task, metric in results.main_metrics.items()}
            scores = "  ".join(f"{task} {cell.score:.1%}" for task, cell in cells.items() if cell is not None)
        lines.append(f"round {each.number}: {count:6,} triplets {seconds:8,.0f} s  {scores}".rstrip())
    return "\n".join(lines)


def check(settings: Settings, steps: list[Step]) -> None:
    """Refuse before the first step what a later one would refuse: files that are missing, unknown options and keys."""
    reference = OmegaConf.select(OmegaConf.create(settings.train), "reference.model_path")
    read = {"model": settings.model, "contexts": settings.contexts, **_evaluated_files(settings)}
    for key, path in (read | ({} if reference is None else {"train.reference.model_path": Path(reference)})).items():
        if not path.exists():
            raise UserError(f"{key}={path}: no such file or directory")
    for step in steps:
        if step.config is not None:
            parse_config(step.config, source="train")
        elif step.command[0] == "megatron-solopo":
            group, name, *arguments = step.command[1:]
            try:
                cli.commands[group].commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
            except click.UsageError as error:
                raise UserError(f"{step.name}: {error.format_message()}") from None


@contextmanager
def alone_in(settings: Settings) -> Iterator[None]:
    """Work alone in the folder of the rounds, once the commands of a start that was killed have ended."""
    settings.work.mkdir(parents=True, exist_ok=True)
    with (settings.work / "loop.lock").open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{settings.work}: another loop works in it; end it, or choose another `work`") from None
        if not have_ended(settings.lock):
            click.echo(f"{settings.work}: waiting until the commands of an earlier start have ended", err=True)
            if not wait_for_end(settings.lock):
                raise UserError(f"{settings.work}: the commands of an earlier start have not ended; end them by hand")
        yield


def run(settings: Settings) -> None:
    """Carry out all steps that are missing."""
    rounds = list(make_rounds(settings))
    check(settings, [step for _, steps in rounds for step in steps])
    with tqdm(total=sum(len(steps) for _, steps in rounds), unit="step") as bar:
        for each, steps in rounds:
            each.check_inputs(input_files(settings, each))
            for place, step in enumerate(steps):
                bar.set_postfix_str(f"round {each.number}: {step.name}")
                if not each.is_done(steps[place:]):
                    each.forget(steps[place:])
                    carry_out(settings, each, step)
                bar.update()


@click.command(context_settings={"max_content_width": 110})
@click.option("--config", required=True, type=click.Path(path_type=Path, exists=True), help="YAML file of the loop.")
@click.argument("overrides", nargs=-1)
def main(config: Path, overrides: tuple[str, ...]) -> None:
    """Carry out what is missing. Stopped or killed at any point and started again, it goes on.

    OVERRIDES are dotted keys that replace values of the file.

    \b
    Examples:
      python examples/on_policy/on_policy.py --config examples/on_policy/loops/miniature.yaml
      python examples/on_policy/on_policy.py --config examples/on_policy/loops/qwen2.5-7b.yaml rounds=3
    """
    try:
        settings = read_settings(config, overrides)
        with alone_in(settings):
            run(settings)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    click.echo(summary(settings))


if __name__ == "__main__":
    sys.exit(main())

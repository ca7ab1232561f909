"""The on-policy loop: two rounds from answers to scores, which go on where they were killed."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from click.testing import CliRunner

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LOOP = EXAMPLES / "on_policy" / "on_policy.py"
for folder in ("reproduction", "on_policy"):
    sys.path.insert(0, str(EXAMPLES / folder))

import click  # noqa: E402
import measure  # noqa: E402
import on_policy  # noqa: E402
from model_server import SERVED_NAME, Server, serving  # noqa: E402
from tied_process import have_ended, runs, tied_process  # noqa: E402

from megatron_solopo.cli.main import cli  # noqa: E402
from megatron_solopo.config import parse_config  # noqa: E402
from megatron_solopo.errors import UserError  # noqa: E402
from megatron_solopo.files import sha256_file  # noqa: E402
from megatron_solopo.results.long_context import read_long_context  # noqa: E402
from miniature import base, pairs  # noqa: E402
from tests.generate.completion_server import completion_server  # noqa: E402

SERVER = """
import json, os, sys, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": sys.argv[2]}]}).encode())
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A weak base model, contexts and a loop of two rounds of three steps."""
    folder = tmp_path_factory.mktemp("on_policy")
    base.train_base({0.02: folder / "base"}, seed=0)
    pairs.write_contexts(folder / "contexts.jsonl", 40, 1, 32, seed=0)
    loop = yaml.safe_load((EXAMPLES / "on_policy" / "loops" / "miniature.yaml").read_text())
    loop |= {"model": str(folder / "base"), "contexts": str(folder / "contexts.jsonl"), "work": str(folder / "work")}
    loop["train"]["training"] |= {"max_steps": 3}
    loop["train"]["optimizer"] |= {"lr_warmup_iters": 1}
    loop["evaluate"] = {"contexts": str(folder / "contexts.jsonl"), "side": "long", "samples": 4}
    (folder / "loop.yaml").write_text(yaml.safe_dump(loop))
    return folder


def run_loop(folder: Path, *overrides: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(LOOP), "--config", str(folder / "loop.yaml"), *overrides]
    return subprocess.run(command, capture_output=True, text=True, env=_environment())


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.timeout(1800)  # a minute and a half of one core, which other work may share
def test_two_rounds_go_on_after_a_kill_and_tell_where_their_data_is_from(inputs: Path) -> None:
    first, second = (inputs / "work" / f"round_{number}" for number in (1, 2))
    command = [sys.executable, str(LOOP), "--config", str(inputs / "loop.yaml"), "evaluate=null"]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment(), start_new_session=True
    )
    while started.poll() is None and not (first / "run" / "metrics.jsonl").exists():
        time.sleep(0.05)
    assert started.poll() is None, started.communicate()
    os.killpg(started.pid, signal.SIGKILL)
    started.communicate()
    assert "train" not in read(first / "round.json")["steps"], "it was killed before it had trained"
    sampled = (first / "responses.jsonl").stat().st_mtime_ns

    done = run_loop(inputs, "evaluate=null")
    assert done.returncode == 0, done.stderr
    assert (first / "responses.jsonl").stat().st_mtime_ns == sampled, "what was there is not made again"
    records = [read(folder / "round.json") for folder in (first, second)]
    assert [each["policy"] for each in records] == [str(inputs / "base"), str(first / "model")]
    assert len({each["policy_weights"] for each in records}) == 2
    assert [each["contexts_sha256"] for each in records] == [sha256_file(inputs / "contexts.jsonl")] * 2
    for number, each in enumerate(records, start=1):
        assert list(each["steps"]) == ["sample", "select", "prepare", "train", "export"]
        asked = each["steps"]["sample"]["command"]
        assert asked[asked.index("--seed") + 1] == str(number) and each["policy"] in asked
    configs = [yaml.safe_load((folder / "train.yaml").read_text()) for folder in (first, second)]
    assert [each["model"]["path"] for each in configs] == [each["policy"] for each in records]
    lines = [line.split() for line in done.stdout.splitlines()[-2:]]
    triplets = [len((folder / "triplets.jsonl").read_text().splitlines()) for folder in (first, second)]
    assert [line[:4] for line in lines] == [
        ["round", f"{number}:", str(count), "triplets"] for number, count in enumerate(triplets, start=1)
    ]
    with pytest.raises(
        click.ClickException, match=r"settings of train have changed since it ran: optimizer.lr=1 \(it was "
    ):
        on_policy.run(on_policy.read_settings(inputs / "loop.yaml", ("evaluate=null", "train.optimizer.lr=1")))


def test_the_summary_tells_scores(inputs: Path, tmp_path) -> None:
    settings = on_policy.read_settings(inputs / "loop.yaml", (f"work={tmp_path}",))
    _, (evaluation,) = next(on_policy.make_rounds(settings))
    cli.main(evaluation.command[1:], standalone_mode=False)
    results = read_long_context(tmp_path / "round_0" / "evaluation.json")
    ((task, metric),) = results.main_metrics.items()
    found = results.cell(task, metric)
    line = on_policy.summary(settings).splitlines()[0]
    assert found is not None and line.endswith(f"{task} {found.score:.1%}")


@pytest.mark.parametrize("path", sorted((EXAMPLES / "on_policy" / "loops").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_loop_is_legal(path: Path) -> None:
    for each, steps in on_policy.make_rounds(on_policy.read_settings(path, ())):
        for step in steps:
            if step.config is not None:
                assert parse_config(step.config, source=path.name).run_dir == each.folder / "run"
            if step.command[0] == "megatron-solopo":
                group, name, *arguments = step.command[1:]
                command = cli.commands[group].commands[name]  # type: ignore[attr-defined]
                command.make_context(name, arguments)  # an error for an unknown option


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("round=2", "unknown key round"),
        ("rounds", "override 'rounds': expected key=value"),
        ("train={a: [", "override 'train=.*': while parsing"),
        ("rounds=0", "rounds=0: Input should be greater than or equal to 1"),
        (
            "server={command: vllm serve a, url: 'http://localhost:8000/v1'}",
            "server.command: must hold {model}",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(inputs: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        on_policy.read_settings(inputs / "loop.yaml", (override,))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=none", "model=none: no such file or directory"),
        ("contexts=none", "contexts=none: no such file or directory"),
        ("evaluate.contexts=none", "evaluate.contexts=none: no such file or directory"),
        ("train.reference.model_path=none", "train.reference.model_path=none: no such file or directory"),
        ("select.scor=sub_em", "select: No such option '--scor'"),
        ("evaluate.batch_size=many", "evaluate: Invalid value for '--batch-size'"),
        ("train.optimizer.lrr=1", r"train: unknown key optimizer.lrr; did you mean optimizer.lr\?"),
        ("sample.seed=3", "sample.seed: the loop sets it; remove it"),
        ("train.model.path=other", "train.model.path: the loop sets it; remove it"),
    ],
)
def test_what_a_later_step_would_refuse_is_told_before_the_first(
    inputs: Path, tmp_path, override: str, message: str
) -> None:
    settings = on_policy.read_settings(inputs / "loop.yaml", (f"work={tmp_path / 'work'}", override))
    with pytest.raises(UserError, match=message):
        on_policy.run(settings)
    assert not (tmp_path / "work").exists()


def test_other_settings_of_an_evaluation_do_not_cost_a_round(tmp_path) -> None:
    each = on_policy.Round(1, tmp_path, tmp_path)
    each.keep(on_policy.Step("evaluate", ["old"], tmp_path), 1.0)
    changed = r"settings of evaluate have changed since it ran: command=new \(it was old\); take the old ones"
    with pytest.raises(click.ClickException, match=changed):
        each.is_done([on_policy.Step("evaluate", ["new"], tmp_path)])


def test_changed_settings_are_named(tmp_path) -> None:
    each = on_policy.Round(1, tmp_path, tmp_path)
    words = ["--config", "train.yaml", "--old"]
    command = ["python", "-m", "megatron_solopo", "train"]
    each.keep(on_policy.Step("train", [*command, *words], tmp_path, {"a": {"b": 1, "c": 2}, "d": [3]}), 1.0)
    ranks = ["torchrun", "--nproc-per-node", "2", *command[1:], *words[:2], "--quiet"]
    with pytest.raises(click.ClickException) as raised:
        each.is_done([on_policy.Step("train", ranks, tmp_path, {"a": {"b": 1, "c": 4}, "d": [3], "e": None})])
    assert (
        "since it ran: command=torchrun (it was python -m megatron_solopo train), "
        "--nproc-per-node=2 -m megatron_solopo train (it was not set), --quiet=true (it was not set), "
        "a.c=4 (it was 2), e=null (it was not set), --old=not set (it was true); choose another `work`"
    ) in raised.value.message
    assert each.is_done(
        [on_policy.Step("train", [*command, "--old", *words[:2]], tmp_path, {"d": [3], "a": {"c": 2, "b": 1}})]
    ), "the order means nothing"


def test_another_command_of_the_server_is_another_setting(inputs: Path, tmp_path) -> None:
    def steps(options: str) -> tuple[on_policy.Round, list[on_policy.Step]]:
        server = f"server={{command: 'vllm serve {{model}} {options}', url: 'http://localhost:8000/v1'}}"
        settings = on_policy.read_settings(inputs / "loop.yaml", (f"work={tmp_path}", server))
        return list(on_policy.make_rounds(settings))[1]

    each, (sample, *_) = steps("--dtype half")
    sample.output.parent.mkdir()
    sample.output.touch()
    each.keep(sample, 1.0)
    each, (sample, *_) = steps("--dtype half")
    assert each.is_done([sample])
    each, (sample, *_) = steps("--dtype float")
    with pytest.raises(click.ClickException, match=r"server.command=.* --dtype float.* \(it was .* --dtype half"):
        each.is_done([sample])
    del each.record["steps"]["sample"]["server"]
    assert each.is_done([sample]), "a round of an older version"


def test_what_only_finished_steps_read_may_be_removed(tmp_path, monkeypatch) -> None:
    """And where an output is made again, so is all that came of it."""
    monkeypatch.setattr(on_policy, "check", lambda *_: None)
    monkeypatch.setattr(on_policy, "weights_fingerprint", lambda _: "the same")
    carried_out: list[str] = []

    def carry_out(_: object, each: on_policy.Round, step: on_policy.Step) -> None:
        carried_out.append(step.name)
        step.output.touch()
        each.keep(step, 1.0)

    monkeypatch.setattr(on_policy, "carry_out", carry_out)
    settings = on_policy.Settings(
        work=tmp_path, model=tmp_path, contexts=Path(__file__), rounds=1, evaluate=on_policy.Options()
    )

    def run(*removed: str) -> list[str]:
        carried_out.clear()
        for name in removed:
            (tmp_path / "round_1" / name).unlink()
        on_policy.run(settings)
        return carried_out.copy()

    names = ["sample", "select", "prepare", "train", "export", "evaluate"]
    assert run() == ["evaluate", *names]
    assert run("responses.jsonl", "triplets.jsonl", "prepared", "run") == []
    assert run("model") == names, "nothing is left that it could be made from"
    assert run("prepared", "model") == ["export", "evaluate"]
    assert run("evaluation.json") == ["evaluate"]


def test_the_miniature_goes_on_where_the_measurement_left_it(monkeypatch) -> None:
    """`measure.py` starts the loop with the very settings of its file."""
    commands = []
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.setattr(measure.subprocess, "run", lambda command, check: commands.append(command))
    measure.run_loop(EXAMPLES / "on_policy" / "work", 0, "two_rounds")
    ((_, script, _, config, *overrides),) = commands
    assert script == str(LOOP)
    assert on_policy.read_settings(Path(config), tuple(overrides)) == on_policy.read_settings(Path(config), ())


def test_a_failed_step_shows_the_end_of_its_log(inputs: Path, tmp_path) -> None:
    (tmp_path / "contexts.jsonl").write_text("{}\n")
    failed = run_loop(inputs, f"work={tmp_path / 'work'}", f"contexts={tmp_path / 'contexts.jsonl'}", "evaluate=null")
    assert failed.returncode == 1 and "data sample" in failed.stderr and "error: " in failed.stderr, failed.stderr


@pytest.fixture
def served(tmp_path) -> Iterator[Callable[..., Server]]:
    """Makes the settings of a server that is a program on a free port. The program gets the port and the arguments."""
    with socket.socket() as reserved:
        # No other program gets the port, but a server that sets this option can listen on it.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]

        def make(program: str, *arguments: str) -> Server:
            path = tmp_path / "the server.py"  # a place with a space
            path.write_text(program)
            command = shlex.join([sys.executable, str(path), str(port), *arguments])
            return Server(command=f"{command} {{model}} '{{\"json\": 1}}'", url=f"http://127.0.0.1:{port}/v1/")

        yield make


def test_a_server_runs_while_it_is_asked_and_leaves_nothing_behind(tmp_path, served: Callable[..., Server]) -> None:
    server = served(SERVER, SERVED_NAME)
    model = tmp_path / "a model"
    with serving(server, model, tmp_path / "lock", tmp_path / "log") as keeper:
        # Not all children of this process: other tests may have left it some.
        started = [psutil.Process(keeper.pid), *psutil.Process(keeper.pid).children(recursive=True)]
        assert any(each.cmdline()[-2:] == [str(model), '{"json": 1}'] for each in started)
        assert not have_ended(tmp_path / "lock")
        with (
            pytest.raises(click.ClickException, match=r"a server answers already \(policy\), and it may"),
            serving(server, model, tmp_path / "lock", tmp_path / "log"),
        ):
            pass
    assert not any(map(runs, started)) and have_ended(tmp_path / "lock")


@pytest.mark.parametrize(
    ("program", "name", "message"),
    [
        (SERVER, "other", "serves other, not policy"),
        ("raise SystemExit(3)", "any", "ended with code 3"),
    ],
)
def test_a_server_that_does_not_start_is_one_line(
    tmp_path, served: Callable[..., Server], program: str, name: str, message: str
) -> None:
    server = served(program, name)
    with (
        pytest.raises(click.ClickException, match=message),
        serving(server, tmp_path, tmp_path / "lock", tmp_path / "log"),
    ):
        pass


def test_a_server_that_never_answers_is_told_with_its_last_answer(tmp_path) -> None:
    seconds = Path("600")  # in the place of a model
    with completion_server() as other:
        server = Server(command="sleep {model}", url=other.url.removesuffix("/v1"), start_minutes=1e-3)
        told = r"no answer after server\.start_minutes=0\.001 \(HTTP 404 from http://.*/models\)"
        with (
            pytest.raises(click.ClickException, match=told),
            serving(server, seconds, tmp_path / "lock", tmp_path / "log"),
        ):
            pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_commands_end_with_the_process_that_started_them(tmp_path, number: int) -> None:
    """Also one whose parent has ended."""
    orphan = f"{sys.executable} -c 'import time; time.sleep(600)' & echo $!"
    program = (
        "import sys, pathlib; from tied_process import tied_process\n"
        "with tied_process(['sh', '-c', sys.argv[1]], pathlib.Path(sys.argv[2]), open(sys.argv[3], 'w')) as process:\n"
        "    process.wait()\n"
    )
    lock, log = tmp_path / "lock", tmp_path / "log"
    starter = subprocess.Popen(
        [sys.executable, "-c", program, f"({orphan}); exec sleep 600", str(lock), str(log)],
        env=_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        while not (log.exists() and log.read_text().endswith("\n")):
            assert starter.poll() is None
            time.sleep(0.05)
        started = [*psutil.Process(starter.pid).children(recursive=True), psutil.Process(int(log.read_text()))]
        assert len(started) >= 3, "the keeper, sleep and the orphan"
        assert not have_ended(lock)
        starter.send_signal(number)
        starter.wait(60)
    finally:
        starter.kill()
        starter.wait()
    while any(map(runs, started)) or not have_ended(lock):
        time.sleep(0.05)


def test_a_lock_is_held_from_the_start_of_a_command(tmp_path) -> None:
    lock = tmp_path / "lock"
    with (tmp_path / "log").open("w") as log, tied_process(["sleep", "600"], lock, log):
        assert not have_ended(lock), "before the keeper has begun"
    assert have_ended(lock)


def test_a_process_that_nobody_asks_for_its_code_has_ended(tmp_path) -> None:
    """As below the first process of many containers, which asks for no code."""
    program = (
        "import ctypes, sys, pathlib; from tied_process import tied_process\n"
        "be_parent_of_orphans = 36\n"
        "ctypes.CDLL(None).prctl(be_parent_of_orphans, 1, 0, 0, 0)\n"
        "command = ['sh', '-c', '(sleep 600 &); exit 3']\n"
        "with tied_process(command, pathlib.Path(sys.argv[1]), sys.stdout, stop_seconds=600) as process:\n"
        "    sys.exit(process.wait())\n"
    )
    environment = _environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "lock")], env=environment, timeout=120)
    assert ended.returncode == 3


def test_a_command_that_ends_hands_its_code_on(tmp_path) -> None:
    for command, code in ((["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -9 $$"], 137), (["no-such-command"], 127)):
        with (tmp_path / "log").open("w") as log, tied_process(command, tmp_path / "lock", log) as process:
            assert process.wait() == code
    assert (tmp_path / "log").read_text() == "no-such-command: No such file or directory\n"


def test_a_step_that_fails_names_a_server_that_has_ended(tmp_path, served: Callable[..., Server]) -> None:
    asked, keeper = tmp_path / "asked", tmp_path / "keeper"
    ending = f"""
def end():
    while not os.path.exists({str(asked)!r}):
        time.sleep(0.05)
    os._exit(5)
with open({str(keeper)!r}, "w") as stream:
    stream.write(str(os.getppid()))
threading.Thread(target=end).start()
HTTPServer("""
    settings = on_policy.Settings(
        work=tmp_path,
        model=tmp_path,
        contexts=tmp_path,
        server=served(SERVER.replace("HTTPServer((", ending + "(", 1), SERVED_NAME),
    )
    # The keeper's code is not asked for before the step has ended, so the system keeps it as a zombie.
    until_ended = f"until grep -q 'State:.Z' /proc/$(cat {keeper})/status; do sleep 0.05; done"
    step = on_policy.Step("sample", ["sh", "-c", f"touch {asked}; {until_ended}; exit 4"], tmp_path / "none")
    with pytest.raises(click.ClickException, match="exit code 4; the server ended with code 5"):
        on_policy.carry_out(settings, on_policy.Round(1, tmp_path, tmp_path), step)


def test_an_export_without_a_record_is_made_again_from_the_newest_checkpoint(tmp_path, monkeypatch) -> None:
    """As a loop leaves it that was killed between the export and its record."""
    monkeypatch.setattr(on_policy, "find_subject", lambda run, _: SimpleNamespace(path=run / "newest"))
    settings = on_policy.Settings(work=tmp_path, model=tmp_path, contexts=tmp_path)
    exported, run = tmp_path / "model", tmp_path / "run"
    exported.mkdir()
    script = f'mkdir {exported} && test "$1" = {run / "newest"}'
    step = on_policy.Step("export", ["sh", "-c", script, "--checkpoint", str(run)], exported)
    each = on_policy.Round(1, tmp_path, tmp_path)
    assert not each.is_done([step])
    on_policy.carry_out(settings, each, step)
    assert on_policy.Round(1, tmp_path, tmp_path).is_done([step])
    exported.rmdir()
    assert not on_policy.Round(1, tmp_path, tmp_path).is_done([step]), "a person has removed it"


def test_a_second_loop_in_the_folder_is_refused(tmp_path) -> None:
    settings = on_policy.Settings(work=tmp_path / "work", model=tmp_path, contexts=tmp_path)
    loop = tmp_path / "loop.yaml"
    loop.write_text(yaml.safe_dump(settings.model_dump(mode="json", include={"work", "model", "contexts"})))
    with on_policy.alone_in(settings):
        second = CliRunner().invoke(on_policy.main, ["--config", str(loop)])
    assert second.exit_code == 1 and f"{settings.work}: another loop works in it" in second.output


def test_a_round_knows_its_model_before_any_answer(tmp_path, monkeypatch) -> None:
    """A server does not tell whose answers it gives: a killed round must not go on with another model."""
    weights = {Path("a"): "1", Path("b"): "2"}
    monkeypatch.setattr(on_policy, "weights_fingerprint", weights.__getitem__)
    on_policy.Round(1, tmp_path, Path("a")).check_inputs({})
    on_policy.Round(1, tmp_path, Path("a")).check_inputs({})
    with pytest.raises(click.ClickException, match=r"other weights \(of a\) than b has now"):
        on_policy.Round(1, tmp_path, Path("b")).check_inputs({})


@pytest.mark.parametrize(
    ("key", "number", "advice"),
    [
        ("contexts", 1, "take the old one again, choose another `work`, or remove"),
        ("evaluate.contexts", 0, "take the old ones again, or set evaluate=null"),
    ],
)
def test_other_rows_under_the_same_name_are_refused(inputs: Path, tmp_path, key: str, number: int, advice: str) -> None:
    """Rounds on different rows are not to be compared, and nothing else in the settings tells them apart."""
    rows = tmp_path / "rows.jsonl"
    text = (inputs / "contexts.jsonl").read_text()
    settings = on_policy.read_settings(inputs / "loop.yaml", (f"work={tmp_path / 'work'}", f"{key}={rows}"))

    def check() -> None:
        each, _ = list(on_policy.make_rounds(settings))[number]
        each.check_inputs(on_policy.input_files(settings, each))

    rows.write_text(text)
    check()
    check()
    rows.write_text(text.replace("a", "b"))
    with pytest.raises(click.ClickException, match=f"the round began with another {key}={rows}; {advice}"):
        check()


def test_the_table_of_the_results_comes_from_the_rounds() -> None:
    folder = EXAMPLES / "on_policy"
    lines = measure.read_lines(folder / "rounds.jsonl")
    document = (folder / "RESULTS.md").read_text(encoding="utf-8")
    assert measure.rounds_table(lines) in document and measure.gains_table(lines) in document
    better = [
        line | {"accuracy": {"16": 1.0, "64": 0.5 if line["model"].startswith("round 2") else 0.25}} for line in lines
    ]
    assert measure.gains_table(better).endswith("| +25.0 | +25.0 | +25.0 | +25.0 [+25.0, +25.0] |")
    changed = [line | {"accuracy": dict.fromkeys(line["accuracy"], 0.123)} for line in lines]
    assert measure.rounds_table(changed).count("12.3% (12.3% to 12.3%)") == len(measure.NAMES)

"""The rows of the paper: every one is a legal run, trains what it says, and has a plan; results become its table."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_solopo.cli.main import cli
from megatron_solopo.config import Config, load_config, warning_without_effect
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.files import read_jsonl
from megatron_solopo.train.trainer import precompute_reference, train
from tests.distributed import run_distributed
from tests.parity import plain
from tests.train.runs import make_inputs

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "paper"
sys.path.insert(0, str(EXAMPLE))

import make_costs  # noqa: E402
import make_results  # noqa: E402
from paper_rows import MODELS, Row, assignments, read_rows  # noqa: E402

ROWS = read_rows()
TRAINED = {name: row for name, row in ROWS.items() if row.pairs is not None}
# One row of each loss. Rows of other pairs or lengths, and more values of alpha, train alike.
_LOSSES = {
    row.overrides: name for name, row in TRAINED.items() if row.sweep in (None, "align") or name == "solo-dpo-alpha-0"
}
RUN = list(_LOSSES.values())
TRIPLETS = 4


def config_of(row: Row, model: str, *overrides: str) -> Config:
    return load_config(EXAMPLE / f"{model}.yaml", [*row.settings(model), *overrides])


def tiny_config(folder: Path, name: str, *overrides: str) -> Config:
    """Two steps of a row on a tiny model and two context-parallel ranks, all triplets in each step."""
    paths = {"run_dir": name, "model.path": "model", "data.path": "prepared", "reference.cache": "reference"}
    sizes = {
        "model.dtype": "float32",
        "data.max_tokens_per_pack": 600,
        "training.global_batch_size": TRIPLETS,
        "training.max_steps": 2,
        "parallel.tensor_model_parallel_size": 1,
        "parallel.context_parallel_size": 2,
        "optimizer.lr": 1e-3,
        "optimizer.lr_warmup_iters": 0,
        "logging.tensorboard": "false",
    }
    changed = {key: folder / value for key, value in paths.items()} | sizes
    return config_of(ROWS[name], MODELS[0], *(f"{key}={value}" for key, value in changed.items()), *overrides)


def run_all(folder: Path) -> None:
    """On both ranks: the reference of all sequences, then every row."""
    precompute_reference(tiny_config(folder, "solo-dpo", "objective.align=both"), overwrite=False)
    for name in RUN:
        train(tiny_config(folder, name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_inputs(tmp_path_factory.mktemp("paper"), rows=TRIPLETS, eval_count=0)
    run_distributed(run_all, 2, path)
    return path


@pytest.fixture(scope="module")
def scored(folder: Path) -> tuple[torch.nn.Module, list[Mapping[str, Any]]]:
    """The model that every row starts from, and all triplets."""
    return plain.load(folder / "model"), list(load_prepared(folder / "prepared").train)


@pytest.mark.parametrize("model", MODELS)
def test_every_row_is_a_legal_configuration_without_idle_keys(model: str) -> None:
    for name, row in TRAINED.items():
        config = config_of(row, model)
        assert warning_without_effect(config, None) is None
        assert config.run_dir == Path("runs/paper") / model / name


def test_published_values_of_alpha_are_those_of_the_rows() -> None:
    published = {"solo-dpo": 3, "solo-simpo": 1, "solo-orpo": 1}
    assert {name: config_of(ROWS[name], "qwen2.5-7b").objective.alpha for name in published} == published
    assert config_of(ROWS["solo-orpo"], "llama-3.1-8b").objective.alpha == 4
    assert config_of(ROWS["solo-orpo-alpha-10"], "llama-3.1-8b").objective.alpha == 10


@pytest.mark.parametrize("name", RUN)
def test_a_row_trains_what_it_says(name: str, folder: Path, scored: Any) -> None:
    """The first step's loss against transformers: loss type, contexts, alignment and alpha all act."""
    model, triplets = scored
    config = tiny_config(folder, name)
    first, second = read_jsonl(folder / name / "metrics.jsonl")
    objective = config.objective.model_dump()
    with torch.no_grad():
        losses = [
            plain.triplet_loss(objective, model, model, row, reference_context=config.reference.context)
            for row in triplets
        ]
    assert first["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert second["loss"] != first["loss"] and first["num_triplets"] == TRIPLETS
    starts_equal = objective["loss_type"] == "dpo" and config.reference.context is None
    assert (abs(first["po_loss"] - math.log(2)) < 1e-6) == starts_equal
    roles = config.objective.roles.all
    largest = max(
        sum(len(row[f"prompt_{role.context}"]) + len(row[role.response]) for role in roles) for row in triplets
    )
    assert first["pack_fill"] * config.data.max_tokens_per_pack > largest, "a pack holds several triplets"


def test_rows_differ_in_the_loss_that_they_begin_with(folder: Path) -> None:
    firsts = {name: read_jsonl(folder / name / "metrics.jsonl")[0]["loss"] for name in RUN}
    # The policy is its own reference, so that no context and no alignment shows before the first step.
    equal = {name for name in RUN if abs(firsts[name] - math.log(2)) < 1e-6}
    assert equal == {"short-dpo", "expand-dpo", "solo-dpo", "solo-dpo-alpha-0", "solo-dpo-align-both"}
    seconds = {name: read_jsonl(folder / name / "metrics.jsonl")[1]["loss"] for name in RUN}
    assert seconds.pop("solo-dpo-alpha-0") == pytest.approx(seconds["short-dpo"], rel=1e-5)
    ordered = sorted(seconds.values())
    assert all(high - low > 1e-5 for low, high in pairwise(ordered)), seconds


def test_bash_gets_what_a_row_needs() -> None:
    text = assignments(ROWS["long-dpo"], "qwen2.5-7b")
    assert "pairs=long\n" in text and "data=data/paper/qwen2.5-7b/long-1100" in text
    assert "overrides=(run_dir=runs/paper/qwen2.5-7b/long-dpo " in text
    longer = assignments(ROWS["solo-orpo-short-tokens-3750"], "llama-3.1-8b")
    assert "short_tokens=4262\nlong_tokens=8012\nanswer_room=512\n" in longer


@pytest.mark.parametrize(("name", "model"), [("longpo", "qwen2.5-7b"), ("solo-orpo-short-tokens-3750", "llama-3.1-8b")])
def test_a_kept_plan_and_its_figures_are_what_the_command_writes_today(
    name: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text, figures = make_costs.make_plan(ROWS[name], model)
    assert text in (EXAMPLE / "plans" / f"{model}.txt").read_text(encoding="utf-8")
    costs = (EXAMPLE / "COSTS.md").read_text(encoding="utf-8").split(f"## {model}")[1]
    assert make_costs.cost_line(ROWS[name], figures) in costs


@pytest.mark.parametrize("model", MODELS)
def test_every_row_that_trains_has_a_plan_of_a_layout_that_fits(model: str) -> None:
    text = (EXAMPLE / "plans" / f"{model}.txt").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("$ ")]
    assert [line.split(f"runs/paper/{model}/")[1].split()[0] for line in commands] == list(make_costs.planned_rows())
    assert text.count("fits into 79.1 GiB") == len(commands)
    costs = (EXAMPLE / "COSTS.md").read_text(encoding="utf-8").split(f"## {model}")[1]
    assert all(f"| {name} |" in costs for name in make_costs.planned_rows())


# As lm-evaluation-harness 0.4.13 writes them, without what the table does not read.
RESULTS: dict[str, dict[str, dict[str, float]]] = {
    "longbench": {
        f"longbench_{task}": {"alias": 0, "qa_f1_score,none": number / 10, "score,none": 0.9}
        for number, task in enumerate(make_results.QA_TASKS)
    },
    "ruler": {
        task: {"4096,none": first, "8192,none": 0.5, "131072,none": -1, "4096_stderr,none": 0.7}
        for task, first in zip(make_results.RULER_QA_TASKS, (0.3, 0.7), strict=True)
    },
    "longbench2": {"longbench2": {"acc,none": 0.3}, "longbench2_code": {"acc,none": 0.9}},
    "leaderboard": {
        task: {metric: 0.1 * number + 0.2 * place for place, metric in enumerate(metrics)}
        for number, (task, metrics) in enumerate(make_results.LEADERBOARD.items())
    },
}


def write_results(folder: Path, groups: Mapping[str, Any], stamp: str = "2026-01-02") -> None:
    for group, scores in groups.items():
        file = folder / group / "exports__aligned" / f"results_{stamp}T00-00-00.000000.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"results": scores, "versions": {}}))


def test_results_become_the_papers_table_and_what_was_not_run_stays_empty(tmp_path: Path) -> None:
    assert make_results.make_results(tmp_path) == (EXAMPLE / "RESULTS.md").read_text(encoding="utf-8")
    write_results(tmp_path / "qwen2.5-7b" / "solo-dpo", RESULTS, stamp="2026-01-03")
    write_results(tmp_path / "qwen2.5-7b" / "solo-dpo", {"longbench2": {"longbench2": {"acc,none": 0.9}}})  # older
    write_results(tmp_path / "llama-3.1-8b" / "solo-dpo-alpha-5", {"ruler": RESULTS["ruler"]})
    qwen, llama = make_results.make_results(tmp_path).split("## llama-3.1-8b")
    assert "| SoLo-DPO | 47.8 | 25.00 | 62.8 | 50.00 | 35.2 | 30.00 | 48.12 | 26.67 | 65.56 |  |" in qwen
    assert "| Long-DPO | 46.9 |  | 62.2 |  | 29.7 |  | 49.01 |  |  |  |" in qwen and "alpha 5" not in qwen
    assert "| SoLo-DPO, alpha 5 |  |  |  | 50.00 |  |  |  |  |  |  |" in llama


def test_results_of_a_part_of_a_group_are_refused_by_name(tmp_path: Path) -> None:
    scores = dict(RESULTS["leaderboard"])
    del scores["leaderboard_musr"]
    write_results(tmp_path / "qwen2.5-7b" / "base", {"leaderboard": scores})
    with pytest.raises(SystemExit, match="base/leaderboard: the results have no 'leaderboard_musr'"):
        make_results.make_results(tmp_path)


def test_ruler_without_a_sample_of_any_length_is_refused(tmp_path: Path) -> None:
    scores = {task: {"4096,none": -1, "4096_stderr,none": 0.7} for task in make_results.RULER_QA_TASKS}
    write_results(tmp_path / "qwen2.5-7b" / "base", {"ruler": scores})
    with pytest.raises(SystemExit, match="base/ruler: the results have no 'score of any length in ruler_qa_squad and"):
        make_results.make_results(tmp_path)


# In the place of every program that run.sh starts: keeps what it was called with, and writes what the next one reads.
PROGRAM = """#!{python}
import json, os, sys
from pathlib import Path
name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
if name == "python" and arguments[0] != "-m":
    os.execv({python!r}, ["python", *arguments])
if name == "curl":
    print(json.dumps({{"data": [{{"id": "qwen2.5-7b"}}]}}))
    sys.exit()
with open("calls.jsonl", "a") as stream:
    stream.write(json.dumps([name, *arguments]) + "\\n")
given = dict(zip(arguments, arguments[1:]))
output = next((Path(given[key]) for key in ("--output", "--out", "--output_path") if key in given), None)
if "lm_eval" in (name, *arguments):
    path = output / "exports__aligned" / "results_2026.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({{"results": json.loads({results!r})[output.name]}}))
elif output is None:
    run = next(each.removeprefix("run_dir=") for each in arguments if each.startswith("run_dir="))
    Path(run, "checkpoints").mkdir(parents=True)
    Path(run, "checkpoints", "latest").write_text("iter_0000079")
elif arguments[1] in ("prepare", "export"):
    output.mkdir(parents=True)
else:
    output.write_text("a triplet\\n" * {triplets})
"""


@pytest.fixture
def run_row(tmp_path: Path) -> Callable[..., tuple["subprocess.CompletedProcess[str]", list[list[str]]]]:
    """Runs run.sh in a folder of its own, and tells how it ended and what it started."""
    shutil.copytree(EXAMPLE, tmp_path / "examples" / "paper")
    programs, corpus = tmp_path / "programs", tmp_path / "musique.jsonl"
    programs.mkdir()
    (tmp_path / "models" / "qwen2.5-7b").mkdir(parents=True)
    corpus.write_text("a question\n" * 10_000)

    def run(*arguments: str, triplets: int = 5000, **environment: str) -> Any:
        for name in ("megatron-solopo", "python", "lm_eval", "sbatch", "srun", "curl"):
            text = PROGRAM.format(python=sys.executable, results=json.dumps(RESULTS), triplets=triplets)
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        calls = tmp_path / "calls.jsonl"
        calls.write_text("")
        given = {"PATH": f"{programs}:{os.environ['PATH']}", "MUSIQUE": str(corpus), "SLURM": ""} | environment
        script = ["bash", str(tmp_path / "examples" / "paper" / "run.sh"), *arguments]
        ended = subprocess.run(script, env=os.environ | given, capture_output=True, text=True)
        return ended, [json.loads(line) for line in calls.read_text().splitlines()]

    return run


def test_a_row_goes_from_the_corpus_to_the_table_and_does_nothing_twice(run_row: Any, tmp_path: Path) -> None:
    ended, calls = run_row("long-dpo")
    assert ended.returncode == 0, ended.stderr
    data = [f"megatron-solopo data {name}" for name in ("build", "sample", "select", "prepare")]
    training = ["python -m megatron_solopo.launch", "megatron-solopo convert export"]
    assert [" ".join(call[:3]) for call in calls] == [*data, *training, *["lm_eval run --model"] * 4]
    for program, *arguments in calls:
        if program == "megatron-solopo":
            group, name, *options = arguments
            cli.commands[group].commands[name].make_context(name, options)  # type: ignore[attr-defined]
    assert calls[1][calls[1].index("--side") + 1] == "long"
    trained = ["--config", "examples/paper/qwen2.5-7b.yaml", *ROWS["long-dpo"].settings("qwen2.5-7b")]
    assert calls[4][-len(trained) :] == trained
    table = (tmp_path / "examples" / "paper" / "RESULTS.md").read_text()
    assert "| Long-DPO | 46.9 | 25.00 | 62.2 | 50.00 | 29.7 | 30.00 | 49.01 | 26.67 |  |  |" in table
    assert run_row("long-dpo")[1] == [], "everything is there"
    same_pairs = run_row("long-simpo", SLURM="yes")[1]
    assert [call[0] for call in same_pairs] == ["sbatch", "megatron-solopo", *["srun"] * 4]
    trained = ["examples/paper/qwen2.5-7b.yaml", *ROWS["long-simpo"].settings("qwen2.5-7b")]
    assert same_pairs[0][-len(trained) :] == trained
    one_by_one = {"--job-name", "paper-qwen2.5-7b-long-simpo", "--dependency=singleton"}
    assert one_by_one <= set(same_pairs[0]), "an earlier start may have left its job"


def test_a_row_stops_where_something_is_missing(run_row: Any) -> None:
    ended, calls = run_row("solo-dpo", MUSIQUE="no-corpus.jsonl")
    assert ended.returncode == 1 and "no-corpus.jsonl" in ended.stderr and calls == []
    ended, calls = run_row("solo-dpo", QUESTIONS="10001")
    assert ended.returncode == 1 and "holds 10000 questions, fewer than QUESTIONS=10001" in ended.stderr and calls == []
    ended, calls = run_row("solo-dpo", triplets=4999)
    assert ended.returncode == 1 and "4999 triplets, not 5000: raise QUESTIONS=10000" in ended.stderr
    assert calls[-1][1:3] == ["data", "select"]
    ended, calls = run_row("no-such-row")
    assert ended.returncode == 1 and "no row no-such-row; python" in ended.stderr and calls == []


def test_more_questions_are_asked_anew(run_row: Any) -> None:
    few = run_row("solo-dpo", triplets=100, QUESTIONS="2")
    more = run_row("solo-dpo", QUESTIONS="3")
    assert few[0].returncode == 1 and more[0].returncode == 0
    asked = [call for call in more[1] if call[1:2] == ["data"]]
    assert [call[2] for call in asked] == ["build", "sample", "select", "prepare"]
    kept = {word for call in few[1] for word in call if word.endswith(".jsonl")}
    assert not kept & set(asked[1]), "other contexts, and a new file of answers"


def test_another_corpus_has_contexts_and_answers_of_its_own(run_row: Any, tmp_path: Path) -> None:
    kept = {word for call in run_row("solo-dpo", triplets=100)[1] for word in call if word.endswith(".jsonl")}
    other = tmp_path / "other.jsonl"
    other.write_text("another question\n" * 10_000)
    ended, calls = run_row("solo-dpo", MUSIQUE=str(other))
    assert ended.returncode == 0, ended.stderr
    asked = [call for call in calls if call[1:2] == ["data"]]
    assert [call[2] for call in asked] == ["build", "sample", "select", "prepare"]
    assert not kept & {word for call in asked[:2] for word in call}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "llama-3.1-8b"], "no model in models/llama-3.1-8b"),
        (["solo-dpo", "llama"], "no model llama; models: qwen2.5-7b, llama-3.1-8b"),
        (["SoLo-SimPO"], "no row SoLo-SimPO; the nearest: solo-simpo"),
        (["longpo-authors", "llama-3.1-8b"], "longpo-authors is no row of llama-3.1-8b, only of qwen2.5-7b"),
        (["solo-orpo-alpha-1"], "solo-orpo-alpha-1 is no row of qwen2.5-7b, only of llama-3.1-8b"),
        (["--help"], "paper_rows.py lists the rows"),
        ([], "name a row"),
    ],
)
def test_a_row_that_cannot_run_is_told_at_once(run_row: Any, arguments: list[str], message: str) -> None:
    refused, calls = run_row(*arguments)
    assert refused.returncode == 1 and message in refused.stderr and calls == [], refused.stderr


def test_a_row_waits_for_another_that_makes_the_same_data(run_row: Any, tmp_path: Path) -> None:
    lock = tmp_path / "programs" / "flock"
    lock.write_text(
        f"#!/bin/bash\n[[ $1 != --nonblock ]] && cp -r {tmp_path}/made/. data/paper/qwen2.5-7b/short-1100\n"
    )
    lock.chmod(0o755)
    (tmp_path / "made" / "prepared").mkdir(parents=True)
    (tmp_path / "data" / "paper" / "qwen2.5-7b").mkdir(parents=True)
    ended, calls = run_row("solo-dpo")
    assert ended.returncode == 0 and "Another row makes data of qwen2.5-7b" in ended.stdout, ended.stderr
    assert not [call for call in calls if "data" in call], "what the other row made is there"


def test_a_server_of_another_model_is_told_before_contexts_are_built(run_row: Any) -> None:
    refused, calls = run_row("solo-dpo", SERVED="other")
    assert "error: SERVER=http://localhost:8000/v1 does not serve SERVED=other" in refused.stderr and calls == []


def test_prompts_of_the_longest_length_keep_their_beginning() -> None:
    """lm-evaluation-harness cuts from the left, and RULER's lengths leave the chat template out."""
    script = (EXAMPLE / "run.sh").read_text()
    (lengths,) = re.findall(r"RULER_LENGTHS:=\[(.+?)\]", script)
    (longest,) = re.findall(r"MAX_LENGTH:=(\d+)", script)
    assert int(longest) >= max(map(int, lengths.split(","))) + 128


def test_a_folder_that_does_not_exist_leaves_the_table_alone(run_row: Any, tmp_path: Path) -> None:
    table = tmp_path / "examples" / "paper" / "RESULTS.md"
    before = table.read_bytes()
    command = [sys.executable, str(table.with_name("make_results.py")), str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and f"error: {tmp_path / 'none'}: no such folder" in done.stderr
    assert table.read_bytes() == before


@pytest.mark.parametrize("path", [EXAMPLE / "README.md", *(ROOT / "examples/on_policy/loops").glob("*.yaml")])
def test_servers_sample_without_the_settings_of_the_models_own_file(path: Path) -> None:
    """Qwen2.5's generation_config.json has a top_k and a penalty, which vLLM would add to every request."""
    for line in path.read_text(encoding="utf-8").splitlines():
        assert "vllm serve" not in line or "--generation-config vllm" in line

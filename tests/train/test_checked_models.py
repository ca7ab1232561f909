"""Every model of a run is checked before it is used, the reference model as well, by every command that takes one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_solopo.config import Config, parse_config
from megatron_solopo.data.settings import PrepareSettings
from megatron_solopo.data.tokenize import prepare
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.preference import evaluate_preference
from megatron_solopo.files import read_jsonl
from megatron_solopo.integrations import PreferenceTask
from megatron_solopo.run_directory import find_subject
from megatron_solopo.train.trainer import precompute_reference, preflight, train
from tests.conversions import QUERY, change_config
from tests.prepared import make_tokenizer
from tests.ranks import layout
from tests.tiny_models import make_model

INPUTS = Path(__file__).parents[1] / "inputs"
DATA = {name: INPUTS / f"triplets_{name}.jsonl" for name in ("eight_rows", "high_word_numbers", "other_vocabulary")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, a model, and reference models that fit or do not."""
    folder = tmp_path_factory.mktemp("checked")
    words = make_tokenizer(folder / "tokenizer") / "tokenizer.json"
    text = words.read_text()
    for old, new in (("w127", "w0"), ("w128", "w1"), ("w129", "yes"), ("w130", "no")):
        text = text.replace(f'"{old}"', f'"{new}"')
    words.write_text(text)
    for name, source in DATA.items():
        prepare(PrepareSettings(input=source, output=folder / name, tokenizer=str(folder / "tokenizer")))
    make_model(folder / "model", "llama2", seed=0)
    make_model(folder / "fits", "qwen3", seed=3)
    make_model(folder / "other", "llama2", seed=1)
    for name in ("model", "fits", "other"):
        shutil.copytree(folder / "tokenizer", folder / name, dirs_exist_ok=True)
    sizes = ("small_vocabulary", "few_positions", "other_shape", "three_heads")
    for name in ("other_tokenizer", "incomplete", "nan", "infinite", *sizes):
        shutil.copytree(folder / "other", folder / name)
    file = folder / "other_tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"w20"', '"w"').replace('"w21"', '"w20"'))
    change_config(folder / "small_vocabulary", vocab_size=80)
    change_weights(folder / "small_vocabulary", cut_vocabulary)
    change_config(folder / "three_heads", num_attention_heads=3, num_key_value_heads=3, hidden_size=48)
    change_config(folder / "few_positions", max_position_embeddings=32)
    change_config(folder / "other_shape", intermediate_size=64)
    change_weights(folder / "incomplete", lambda tensors: tensors.pop(QUERY))
    change_weights(folder / "nan", lambda tensors: tensors[QUERY][3].fill_(torch.nan))
    # Every weight is finite, but not the numbers that come of those of "yes" and "no".
    change_weights(folder / "infinite", lambda tensors: tensors["lm_head.weight"][129:].fill_(3e38))
    return folder


def change_weights(model: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def cut_vocabulary(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:80].clone()


def config(folder: Path, reference: str, data: str = "eight_rows", **sections: Any) -> Config:
    return parse_config(
        {
            "run_dir": folder / "run",
            "model": {"path": folder / "model"},
            "data": {"path": folder / data, "max_tokens_per_pack": 400},
            "reference": {"model_path": folder / reference},
            "training": {"global_batch_size": 2, "max_steps": 1},
            "logging": {"tensorboard": False},
            **sections,
        },
        source="test",
    )


def evaluate(settings: Config) -> None:
    subject = find_subject(settings.model.path, "--model")
    evaluate_preference(subject, settings, split="train", output=settings.run_dir / "result.json")


def integrate(settings: Config) -> None:
    with layout():
        PreferenceTask(settings)


COMMANDS: dict[str, Callable[[Config], object]] = {
    "train": train,
    "reference": lambda settings: precompute_reference(settings, overwrite=False),
    "preflight": preflight,
    "evaluate preference": evaluate,
    "integrations": integrate,
}
REFUSED = {
    "other_tokenizer": ("eight_rows", "which is not the tokenizer of the reference model {reference}"),
    "small_vocabulary": ("high_word_numbers", "but the reference model {reference} has embeddings for ids up to 79"),
    "few_positions": ("eight_rows", "the reference model {reference} has 32 positions"),
    "missing": ("eight_rows", "config.json: no such file"),
}
# The integrations read the reference's numbers from its cache, and load no reference model.
REFUSED_BEFORE_LOADING = {
    "incomplete": ("eight_rows", "{reference}: 1 missing tensor"),
    "other_shape": ("eight_rows", "{reference}: model.layers.0.mlp.gate_proj.weight has shape (48, 32), but config"),
}


def refusal(command: str, settings: Config) -> str:
    with pytest.raises(UserError) as error:
        COMMANDS[command](settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("reference", REFUSED)
def test_a_reference_model_that_does_not_fit_the_data_is_refused(folder: Path, command: str, reference: str) -> None:
    data, words = REFUSED[reference]
    message = refusal(command, config(folder, reference, data))
    assert words.format(reference=folder / reference) in message
    assert not (folder / "run").exists()


@pytest.mark.parametrize("command", ["train", "evaluate preference"])
@pytest.mark.parametrize("reference", REFUSED_BEFORE_LOADING)
def test_a_reference_model_without_its_tensors_is_refused(folder: Path, command: str, reference: str) -> None:
    data, words = REFUSED_BEFORE_LOADING[reference]
    assert words.format(reference=folder / reference) in refusal(command, config(folder, reference, data))
    assert not (folder / "run").exists()


def test_a_layout_that_does_not_divide_the_reference_model_names_it(folder: Path) -> None:
    settings = config(folder, "three_heads", parallel={"tensor_model_parallel_size": 2})
    message = refusal("train", settings)
    assert message.startswith(f"reference.model_path={folder / 'three_heads'}: parallel.tensor_model_parallel_size=2")
    assert "the model's 3 attention heads" in message


def test_a_missing_reference_model_is_named_by_its_own_key(folder: Path) -> None:
    assert "set reference.model_path to one" in refusal("train", config(folder, "missing"))


@pytest.mark.parametrize("command", ["train", "reference", "preflight", "evaluate preference"])
def test_weights_that_are_not_finite_are_refused_with_tensor_and_file(folder: Path, command: str) -> None:
    message = refusal(command, config(folder, "nan"))
    assert message.startswith(f"{folder / 'nan' / 'model.safetensors'}: {QUERY} is not finite")


@pytest.mark.parametrize("command", ["train", "preflight", "evaluate preference"])
def test_weights_of_the_policy_are_checked_alike(folder: Path, command: str) -> None:
    message = refusal(command, config(folder, "fits", model={"path": folder / "nan"}, run_dir=folder / "policy"))
    assert message.startswith(f"{folder / 'nan' / 'model.safetensors'}: {QUERY} is not finite")


@pytest.mark.parametrize("command", ["train", "reference", "evaluate preference"])
def test_log_probabilities_that_are_not_finite_name_the_model_and_not_the_row(folder: Path, command: str) -> None:
    message = refusal(command, config(folder, "infinite", "other_vocabulary"))
    assert message.startswith(f"the reference model {folder / 'infinite'} gives log-probabilities that are not finite")
    assert " of n0 (" in message and "the rows are not the cause" in message
    # What is finite may wait in a journal, but no finished cache is there.
    assert not list((folder / "run").rglob("reference.json"))


def test_an_evaluated_model_whose_log_probabilities_are_not_finite_is_named(folder: Path) -> None:
    settings = config(folder, "fits", "other_vocabulary", model={"path": folder / "infinite"})
    assert refusal("evaluate preference", settings).startswith(f"the model {folder / 'infinite'} gives log-prob")


def test_a_reference_model_of_another_family_and_size_works(folder: Path) -> None:
    settings = config(folder, "fits", run_dir=folder / "works")
    train(settings)
    assert [step["skipped"] for step in read_jsonl(folder / "works" / "metrics.jsonl")] == [0]
    integrate(settings)


def test_a_preflight_says_what_the_models_were_checked_for(folder: Path) -> None:
    rows = dict(preflight(config(folder, "fits", run_dir=folder / "preflight")))
    assert "positions" in rows["data and models"] and "2 models" in rows["data and models"]


def test_a_cache_with_numbers_that_are_not_finite_is_refused(folder: Path) -> None:
    """An older version could have written it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    settings = config(folder, "fits", run_dir=folder / "old_cache")
    file = precompute_reference(settings, overwrite=False) / "train.parquet"
    table = pq.read_table(file)
    values = [float("-inf"), *table["short_chosen"].to_pylist()[1:]]
    pq.write_table(table.set_column(1, "short_chosen", pa.array(values, pa.float32())), file)
    message = refusal("train", settings)
    assert message.startswith(f"{file}: holds log-probabilities that are not finite") and "computed again" in message

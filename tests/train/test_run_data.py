"""The prepared data of a run: checks against the model, and passes with their progress."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.config import parse_config
from megatron_solopo.data.loader import LoaderSource, TripletDataset
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.data.settings import PrepareSettings
from megatron_solopo.data.tokenize import prepare
from megatron_solopo.errors import UserError
from megatron_solopo.train import run_data
from tests.prepared import make_prepared, make_tokenizer
from tests.ranks import layout
from tests.tiny_models import TINY, VOCAB_SIZE, make_model


def test_packs_are_padded_for_fp8_where_it_is_on(tmp_path: Path) -> None:
    prepared = load_prepared(make_prepared(tmp_path / "prepared", rows=12, eval_count=0, seed=0))
    dataset = TripletDataset(prepared.train, {"short": "prompt_short", "long": "prompt_long"}, TINY)
    sizes = {}
    for fp8 in (None, "hybrid"):
        config = parse_config(
            {
                "run_dir": "unused",
                "model": {"path": "unused", "fp8": fp8},
                "data": {"path": "unused", "max_tokens_per_pack": 400},
                "training": {"global_batch_size": 12},
            },
            source="test",
        )
        source = LoaderSource(dataset, config.objective.roles.all)
        with layout() as groups:
            packs = run_data.training_batches(config, [source], groups).next_batch().packs
        sizes[fp8] = [pack.padded_tokens for pack in packs]
    assert all(size % 16 == 0 and size <= 400 for size in sizes["hybrid"])
    assert any(size % 16 for size in sizes[None])


@pytest.fixture
def padded(tmp_path: Path) -> Path:
    """A model whose own tokenizer has a `[PAD]` one past the embedding, and rows prepared with that tokenizer."""
    model = make_tokenizer(make_model(tmp_path / "model", "llama3"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    return tmp_path


def load(root: Path, chosen: str, *, old_manifest: bool = False) -> run_data.RunDatasets:
    row = {"id": "a", "prompt_short": "w2 w3", "prompt_long": "w2 w3 w4", "chosen": chosen, "rejected": "w5"}
    (root / "rows.jsonl").write_text(json.dumps(row) + "\n")
    output = root / "prepared"
    prepare(PrepareSettings(input=root / "rows.jsonl", output=output, tokenizer=str(root / "model"), overwrite=True))
    if old_manifest:
        manifest = json.loads((output / "manifest.json").read_text())
        del manifest["largest_token_id"]
        (output / "manifest.json").write_text(json.dumps(manifest))
    sections = {
        "run_dir": "unused",
        "model": {"path": str(root / "model")},
        "data": {"path": str(output), "max_tokens_per_pack": 400},
        "training": {"global_batch_size": 1},
    }
    with layout():
        return run_data.load_run_datasets(parse_config(sections, source="test"), read_architecture(root / "model"))


def test_an_unused_token_past_the_embedding_is_no_mistake(padded: Path) -> None:
    datasets = load(padded, "w6")
    assert (datasets.manifest.vocab_size, datasets.manifest.largest_token_id) == (VOCAB_SIZE + 1, 6)


@pytest.mark.parametrize("old_manifest", [False, True])
def test_a_token_past_the_embedding_that_occurs_is_named_with_the_way_out(padded: Path, old_manifest: bool) -> None:
    with pytest.raises(UserError) as caught:
        load(padded, "w6 [PAD]", old_manifest=old_manifest)
    assert f"holds the token id {VOCAB_SIZE}" in str(caught.value)
    assert f"has embeddings for ids up to {VOCAB_SIZE - 1}; extend the embedding" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"path": "chats"}, "objective.name=solopo compares two responses; set objective.name=sft"),
        (
            {"sources": [{"path": "chats", "name": "talk"}]},
            "its objective solopo compares two responses; set `objective: sft` of the source talk in data.sources",
        ),
    ],
)
def test_instructions_under_another_objective_are_refused_with_the_key_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = load_prepared(make_prepared(tmp_path / "chats", rows=3, eval_count=0, seed=0, kind="instruction"))
    sections = {
        "run_dir": "unused",
        "model": {"path": "unused"},
        "data": data | {"max_tokens_per_pack": 400},
        "training": {"global_batch_size": 1},
    }
    with layout(), pytest.raises(UserError) as caught:
        run_data.load_run_sources(parse_config(sections, source="test"), TINY, [prepared])
    assert str(caught.value).endswith(words)

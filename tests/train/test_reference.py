"""The cache of reference log-probs belongs to tokens and weights, and says what is wrong with it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_solopo.config import Config
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.data.settings import PrepareSettings
from megatron_solopo.data.tokenize import prepare
from megatron_solopo.errors import UserError
from megatron_solopo.parallel import topology
from megatron_solopo.train.reference import _differences, cached_reference
from megatron_solopo.train.session import check_and_join
from megatron_solopo.train.trainer import precompute_reference
from tests.distributed import run_distributed
from tests.parity import plain
from tests.prepared import make_prepared, write_triplets
from tests.train.runs import make_inputs, small_config

LONG_PO = {"name": "long_po"}
SPOILS: dict[str, Any] = {
    "no JSON": lambda found: None,
    "a list": lambda found: [found],
    "nothing in it": lambda found: {},
    "no roles": lambda found: {key: value for key, value in found.items() if key != "roles"},
    "roles that are a number": lambda found: found | {"roles": 3},
    "data that are a text": lambda found: found | {"data": "prepared"},
}


def run_all(folder: Path) -> dict[str, str]:
    """Make a cache, and read it in many ways; returns the errors."""
    plain = small_config(folder, "run", {})
    precompute_reference(plain, overwrite=False)
    cache = folder / "reference"
    manifest = json.loads((cache / "reference.json").read_text())
    found = {"same": read(plain)}
    for name, spoil in SPOILS.items():
        spoiled = spoil(manifest)
        (cache / "reference.json").write_text("{" if spoiled is None else json.dumps(spoiled))
        found[name] = read(plain)
    (cache / "reference.json").write_text(json.dumps({key: manifest[key] for key in manifest if key != "tokens"}))
    found["older"] = read(plain)
    (cache / "reference.json").write_text(json.dumps(manifest))
    for name in ("dated", "other", "renamed"):
        data = {"path": folder / name, "max_tokens_per_pack": 200}
        found[name] = read(small_config(folder, "run", {}, data=data))
    model = {"path": plain.model.path, "dtype": "bfloat16"}
    found["bfloat16"] = read(small_config(folder, "run", {}, model=model))
    found["both"] = read(small_config(folder, "run", {}, objective={"align": "both"}))
    found["verbose"] = read(small_config(folder, "run", {}, objective={"ld_alpha": 0.5}))
    found["verbose as it is"] = read(small_config(folder, "run", {}, objective={"ld_alpha": 1.0}))
    of_short = {"cache": folder / "of_short", "context": "short"}
    precompute_reference(small_config(folder, "run", {}, objective=LONG_PO, reference=of_short), overwrite=False)
    for name, objective in (("long pair", LONG_PO), ("solopo", {})):
        # One cache holds other sequences too, the other one only those that the reference reads.
        for cache in ("reference", "of_short"):
            reference = of_short | {"cache": folder / cache}
            settings = small_config(folder, "run", {}, objective=objective, reference=reference)
            found[f"{name} from {cache}"] = read(settings, folder / f"{name} from {cache}.pt")
    own = of_short | {"context": None}
    found["long of short"] = read(small_config(folder, "run", {}, objective=LONG_PO, reference=own))
    pairs = {"path": folder / "pairs", "max_tokens_per_pack": 200}
    found["pairs"] = read(small_config(folder, "run", {}, data=pairs, objective=LONG_PO, reference=of_short))
    return found


def read(config: Config, kept: Path | None = None) -> str:
    """The error of reading the cache, or "read". What was read for the training split goes to the file `kept`."""
    groups = None
    try:
        model, groups, (source,) = check_and_join(config)
        datasets = source.datasets
        found = cached_reference(config, model, datasets)["train"]
    except UserError as error:
        return str(error)
    finally:
        if groups is not None:
            topology.destroy(groups)
    if kept is not None:
        torch.save((list(map(str, found.roles)), found.logps), kept)
    return "read"


def make_pairs(path: Path) -> None:
    """Prepared rows with one prompt each."""
    rows = (json.loads(line) for line in write_triplets(path.with_suffix(".jsonl"), 8, seed=2).read_text().splitlines())
    names = {"prompt_long": "prompt", "chosen": "chosen", "rejected": "rejected"}
    lines = [json.dumps({new: row[old] for old, new in names.items()}) for row in rows]
    path.with_suffix(".jsonl").write_text("\n".join(lines))
    tokenizer = str(path.with_name("prepared.tokenizer"))
    prepare(PrepareSettings(input=path.with_suffix(".jsonl"), output=path, tokenizer=tokenizer))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def found(folder: Path) -> Mapping[str, str]:
    make_prepared(folder / "other", rows=15, eval_count=5, seed=1)
    make_pairs(folder / "pairs")
    # The same file by the same tokenizer and template, and other tokens all the same: a template that asks the clock.
    shutil.copytree(folder / "other", folder / "dated")
    own, others = (json.loads((folder / name / "manifest.json").read_text()) for name in ("prepared", "dated"))
    dated = others | {"fingerprint_parts": own["fingerprint_parts"]}
    (folder / "dated" / "manifest.json").write_text(json.dumps(dated))
    # The same tokens from another file.
    shutil.copytree(folder / "prepared", folder / "renamed")
    renamed = own | {"fingerprint_parts": own["fingerprint_parts"] | {"source": "f" * 64}}
    (folder / "renamed" / "manifest.json").write_text(json.dumps(renamed))
    result: Mapping[str, str] = run_distributed(run_all, 1, folder)[0]
    assert not any("\n" in message for message in result.values())
    return result


def test_a_cache_serves_the_same_tokens_whatever_they_were_made_from(found: Mapping[str, str]) -> None:
    assert found["same"] == found["renamed"] == "read"


def test_a_cache_of_yesterdays_tokens_is_refused(found: Mapping[str, str]) -> None:
    assert "made for another data (from the same file" in found["dated"]
    assert "does the chat template write the date?" in found["dated"]
    assert "reference --overwrite" in found["dated"] and "or set reference.cache" in found["dated"]


def test_other_data_are_refused_with_what_differs(found: Mapping[str, str]) -> None:
    assert "made for another data.source, data.seed; " in found["other"]


def test_a_cache_of_another_precision_or_objective_names_both_values_and_the_key(found: Mapping[str, str]) -> None:
    assert "made for another dtype (float32; this run has model.dtype=bfloat16); run " in found["bfloat16"]
    assert "made for another ld_alpha (null; this run has objective.ld_alpha=0.5); run " in found["verbose"]
    assert found["verbose as it is"] == "read"
    needing = "objective.name, objective.align or reference.context"
    assert f"objective (without long_rejected, which {needing} needs)" in found["both"]


@pytest.mark.parametrize("cache", ["reference", "of_short"])
def test_the_reference_of_answers_behind_the_long_context_may_be_that_of_the_short_one(
    cache: str, found: Mapping[str, str], folder: Path
) -> None:
    """Against transformers, from a cache that holds other sequences too, and from one that holds no others."""
    model = plain.load(folder / "model")
    rows = load_prepared(folder / "prepared").train.select(range(3))
    roles = {"long pair": ["long_chosen", "long_rejected"], "solopo": ["short_chosen", "short_rejected", "long_chosen"]}
    for name, expected_roles in roles.items():
        assert found[f"{name} from {cache}"] == "read"
        read_roles, logps = torch.load(folder / f"{name} from {cache}.pt")
        assert read_roles == expected_roles
        for place, row in enumerate(rows):
            answers = [row[role.split("_")[1]] for role in expected_roles]
            with torch.no_grad():
                expected = [plain.response_logprob(model, row["prompt_short"], answer) for answer in answers]
            torch.testing.assert_close(logps[place], torch.stack(expected), rtol=1e-5, atol=1e-4)


def test_a_cache_of_short_contexts_has_no_other_sequences_and_says_so(found: Mapping[str, str], folder: Path) -> None:
    manifest = json.loads((folder / "of_short" / "reference.json").read_text())
    assert manifest["roles"] == ["short_chosen", "short_rejected"]
    assert "objective (without long_chosen, long_rejected, which " in found["long of short"]


def test_a_reference_behind_the_short_context_needs_triplets(found: Mapping[str, str]) -> None:
    assert (
        "holds plain pairs (prompt, chosen, rejected), but reference.context=short needs prompt_short"
        in (found["pairs"])
    )
    assert found["pairs"].endswith("prepare triplets, or set reference.context=null")


def test_other_fp8_settings_are_named_with_both_values() -> None:
    plain, delayed, blockwise = ({}, *({"fp8": "hybrid", "fp8_recipe": each} for each in ("delayed", "blockwise")))
    for new, old, wanted in (
        (delayed, blockwise, ["fp8_recipe (blockwise; this run has model.fp8_recipe=delayed)"]),
        (plain, delayed, ["fp8 (hybrid; this run has model.fp8=null)"]),
        (delayed, plain, ["fp8 (null; this run has model.fp8=hybrid)"]),
        # A cache of a version that did not have a setting, which then was Megatron-Core's default.
        (delayed | {"first_last_layers_bf16": False}, delayed, []),
        (
            delayed | {"first_last_layers_bf16": True},
            delayed,
            ["first_last_layers_bf16 (False; this run has model.first_last_layers_bf16=True)"],
        ),
    ):
        assert _differences({"fp8": new, "tokens": ""}, {"fp8": old, "tokens": ""}, {}) == wanted


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_manifest_of_any_shape_is_called_damaged(spoil: str, found: Mapping[str, str]) -> None:
    assert "reference.json: missing or damaged; delete " in found[spoil]


def test_a_cache_of_an_older_version_is_called_so(found: Mapping[str, str]) -> None:
    assert "are of an older version, which did not keep the hash of the tokens" in found["older"]
    assert "reference --overwrite" in found["older"]

"""The cache of reference log-probs belongs to tokens and weights, and says what is wrong with it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_solopo.config import Config
from megatron_solopo.errors import UserError
from megatron_solopo.parallel import topology
from megatron_solopo.train.reference import _differences, cached_reference
from megatron_solopo.train.session import check_and_join
from megatron_solopo.train.trainer import precompute_reference
from tests.distributed import run_distributed
from tests.prepared import make_prepared
from tests.train.runs import make_inputs, small_config

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
    return found


def read(config: Config) -> str:
    model, groups, datasets = check_and_join(config)
    try:
        cached_reference(config, model, datasets)
    except UserError as error:
        return str(error)
    finally:
        topology.destroy(groups)
    return "read"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    folder = make_inputs(tmp_path_factory.mktemp("cache"))
    make_prepared(folder / "other", rows=15, eval_count=5, seed=1)
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
    assert "objective (without long_rejected, which objective.name or objective.align needs)" in found["both"]


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

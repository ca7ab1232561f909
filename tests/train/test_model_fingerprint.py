"""Ranks share the reading of weights whose checksums are not known, and the watchdog hears of it on each."""

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.torch import load_file, save_file

from megatron_solopo import checksums
from megatron_solopo.checkpoint.fingerprint import weights_fingerprint
from megatron_solopo.checksums import FILES_AT_ONCE
from megatron_solopo.files import write_json
from megatron_solopo.parallel.agreement import on_rank_0
from megatron_solopo.train.identity import model_fingerprint
from tests.ranks import two_ranks
from tests.tiny_models import make_model

FILES = 2 * FILES_AT_ONCE + 1
"""One more than two ranks read at a time."""


def make_shards(folder: Path) -> str:
    path = make_model(folder, "qwen2_tied")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = {name: f"model-{number % FILES + 1:05d}-of-{FILES:05d}.safetensors" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in names if names[name] == file}, path / file, {"format": "pt"})
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    return str(path)


def on_two_ranks() -> dict[str, Any]:
    path = Path(on_rank_0(lambda: make_shards(Path(tempfile.mkdtemp()))))
    told: list[None] = []
    with mock.patch.object(checksums, "_read_file", wraps=checksums._read_file) as reading:
        found = model_fingerprint(path, lambda: told.append(None))
    again = on_rank_0(lambda: weights_fingerprint(path))
    return {"found": found, "alone": again, "read": reading.call_count, "told": len(told)}


def test_each_file_is_read_by_one_rank() -> None:
    first, second = two_ranks(__name__)
    assert first["found"] == second["found"] == first["alone"]
    assert first["read"] + second["read"] == FILES and second["read"] >= FILES_AT_ONCE


def test_every_rank_tells_its_watchdog() -> None:
    """At least once for each round, also where a rank has nothing to read."""
    for rank in two_ranks(__name__):
        assert rank["told"] >= 2

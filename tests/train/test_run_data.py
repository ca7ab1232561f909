"""How long passes over the data tell their progress."""

from pathlib import Path

import pytest

from megatron_solopo import progress
from megatron_solopo.config import parse_config
from megatron_solopo.data.loader import TripletDataset
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.train import run_data
from tests.prepared import make_prepared
from tests.ranks import layout
from tests.tiny_models import TINY


@pytest.mark.parametrize(("seconds", "told"), [(0.0, True), (3600.0, False)])
def test_a_log_gets_whole_lines_and_none_for_short_work(
    seconds: float, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = load_prepared(make_prepared(tmp_path / "prepared", rows=40, eval_count=0, seed=0))
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {"path": "unused"},
            "data": {"path": "unused", "max_tokens_per_pack": 400},
            "training": {"global_batch_size": 1},
        },
        source="test",
    )
    dataset = TripletDataset(prepared.train, {"short": "prompt_short", "long": "prompt_long"}, TINY)
    monkeypatch.setattr(progress, "_LOG_SECONDS", seconds)
    capsys.readouterr()
    with layout() as groups:
        assert sum(batch.num_triplets for batch in run_data.single_pass(config, dataset, groups, "reference")) == 40
    lines = [line.strip() for line in capsys.readouterr().err.replace("\r", "").splitlines() if line.strip()]
    assert any(line.startswith("reference: 3/3 batches in ") for line in lines) is told
    assert all("%|" not in line for line in lines)


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
        with layout() as groups:
            packs = run_data.training_batches(config, dataset, groups).next_batch().packs
        sizes[fp8] = [pack.padded_tokens for pack in packs]
    assert all(size % 128 == 0 and size <= 400 for size in sizes["hybrid"])
    assert any(size % 128 for size in sizes[None])

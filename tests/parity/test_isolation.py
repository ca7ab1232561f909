"""Sequences of a pack do not see each other, on any pipeline stage, also where they share a prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel import topology
from megatron_solopo.train.policy import load_model
from megatron_solopo.train.step import logprob_report, run_schedule
from tests.distributed import run_distributed
from tests.parity.layouts import ONE_PACK, Layout, make_config, my_packs
from tests.parity.plain import Row
from tests.parity.test_parity import make_rows
from tests.tiny_models import VOCAB_SIZE, make_model

pytestmark = pytest.mark.parity

OBJECTIVE = {"name": "solopo", "loss_type": "simpo", "align": "both"}
LAYOUTS = {
    "pp4": {"pipeline_model_parallel_size": 4},
    "cp4": {"context_parallel_size": 4},
    "tp4": {"tensor_model_parallel_size": 4},
    "tp2-pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}
ROWS = make_rows(4, seed=3)
CHANGED = 2


# What is changed -> the places of the sequences that it changes: short chosen and rejected, long chosen and rejected.
CHANGES = {"prompt_long": (2, 3), "chosen": (0, 2), "rejected": (1, 3)}


def perturbed(rows: Sequence[Row], name: str) -> list[Row]:
    """Another prompt or answer of the same length for one triplet: two of the pack's sixteen sequences change."""
    changed = dict(rows[CHANGED])
    changed[name] = [(token + 1) % VOCAB_SIZE for token in changed[name]]
    return [changed if number == CHANGED else row for number, row in enumerate(rows)]


def score(model: Path) -> dict[str, list[torch.Tensor]]:
    """On every rank: log-probs [4, 4] of the pack as it is and with each change; empty without the loss."""
    return {name: _score(model, Layout(name, ONE_PACK, parallel)) for name, parallel in LAYOUTS.items()}


def _score(model: Path, layout: Layout) -> list[torch.Tensor]:
    config = make_config(model, OBJECTIVE, layout)
    groups = topology.initialize(config.parallel, seed=1)
    try:
        chunks = load_model(resolve_model(config.model, config.parallel), groups, chunk_tokens=layout.chunk_tokens)
        found = []
        for rows in (ROWS, *(perturbed(ROWS, name) for name in CHANGES)):
            packs = my_packs(rows, 0, layout, config.objective.roles.all, groups)
            with torch.no_grad():
                found += run_schedule(chunks, packs, logprob_report(groups), groups, forward_only=True)
        return found
    finally:
        topology.destroy(groups)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_distributed(score, 4, make_model(tmp_path_factory.mktemp("model"), "qwen2"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_perturbing_one_sequence_leaves_the_others_bit_equal(scores: Any, name: str) -> None:
    on_last_stage = [rank[name] for rank in scores if rank[name]]
    assert on_last_stage
    for before, *after in on_last_stage:
        for scores_after, places in zip(after, CHANGES.values(), strict=True):
            changed = {(CHANGED, place) for place in places}
            assert {tuple(place) for place in (before != scores_after).nonzero().tolist()} == changed

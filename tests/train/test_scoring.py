"""What scores of a data set refuse: numbers that are not finite, and verbose tokens where one response is read."""

from typing import Any

import datasets
import pytest
import torch

from megatron_solopo.config import ObjectiveConfig, parse_config
from megatron_solopo.data.loader import TripletDataset
from megatron_solopo.errors import UserError
from megatron_solopo.train.scoring import check_finite, score_sequences
from megatron_solopo.train.step import ReferenceLogprobs
from tests.tiny_models import TINY

ROLES = ObjectiveConfig(name="short_po").roles.all


def dataset(source: str = "") -> TripletDataset:
    table = datasets.Dataset.from_dict({"id": ["first", "second"]})
    return TripletDataset(table, {}, TINY, source)


@pytest.mark.parametrize(("source", "name"), [("", "second"), ("books", "books/second")])
def test_a_row_whose_score_is_not_finite_is_named_with_its_source(source: str, name: str) -> None:
    logprobs = ReferenceLogprobs(ROLES, torch.tensor([[-1.0, -2.0], [-3.0, torch.nan]]))
    with pytest.raises(UserError, match=rf"for 1 of 4 sequences: short_rejected of {name} \(nan\);"):
        check_finite(logprobs, dataset(source), "the model", "float32")


def test_a_pass_over_one_response_has_no_verbose_tokens() -> None:
    values: dict[str, Any] = {
        "run_dir": "unused",
        "model": {"path": "unused"},
        "data": {"path": "unused", "max_tokens_per_pack": 10},
        "training": {"global_batch_size": 1},
        "objective": {"ld_alpha": 0.5},
    }
    topology: Any = None
    with pytest.raises(AssertionError, match="verbose"):
        score_sequences(parse_config(values, "test"), [], dataset(), topology, "test", separate_roles=True)

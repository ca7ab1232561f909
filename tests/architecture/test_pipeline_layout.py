"""Layouts of stages are read as Megatron-Core reads them; what does not fit is one line."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_solopo.architecture.layout import check_layout
from megatron_solopo.architecture.pipeline_layout import balanced_layout, parse_layout, stage_layers
from megatron_solopo.config import ParallelConfig
from megatron_solopo.errors import UserError
from tests.layouts import pp
from tests.tiny_models import TINY

pytestmark = pytest.mark.parity

LETTERS = {"embedding": "E", "decoder": "t", "loss": "L"}
PIECES = st.one_of(
    st.sampled_from(["t", "tt", "|", ",", "E", "L"]),
    st.builds("{}*{}".format, st.sampled_from("t|"), st.integers(1, 12)),
    st.builds("({})*{}".format, st.sampled_from(["t|", "tt|t", "|t*3", "t,t|"]), st.integers(1, 12)),
)


def parallel(text: str | None, size: int = 2, chunks: int | None = None, **more: Any) -> ParallelConfig:
    return ParallelConfig(**pp(size, chunks, pipeline_model_parallel_layout=text, **more))


@given(st.lists(PIECES, min_size=1, max_size=8).map("".join))
def test_a_layout_is_read_as_megatron_reads_it(text: str) -> None:
    theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert list(parse_layout(text)) == ["".join(LETTERS[layer.name] for layer in stage) for stage in theirs]


@pytest.mark.parametrize(
    ("text", "size", "chunks", "expected"),
    [
        ("Et|tttL", 2, None, (1, 3)),
        ("E|(tt|)*2,L", 4, None, (0, 2, 2, 0)),
        ("E|tt|t|tL", 2, 2, (0, 2, 1, 1)),
        (None, 2, 2, (1, 1, 1, 1)),
        (None, 1, None, (4,)),
    ],
)
def test_layers_of_each_stage(text: str | None, size: int, chunks: int | None, expected: tuple[int, ...]) -> None:
    assert stage_layers(4, parallel(text, size, chunks)) == expected


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("Ett|ttx", {}, ["Ett|ttx", "'x'", "t a layer"]),
        ("Ett|mttL", {}, ["'m'"]),
        ("Ett|t t L", {}, ["' '"]),
        ("Et|t|ttL", {}, ["3 stages", "pipeline_model_parallel_size=2", "is 2"]),
        ("Et|tttL", {"chunks": 2}, ["2 stages", "virtual_pipeline_model_parallel_size=2", "is 4"]),
        ("Ett|tttL", {}, ["4 layers", "it has 1 E, 5 t and 1 L", "for example to 'Ett|ttL'"]),
        ("tt|ttL", {}, ["must be E", "then L", "0 E, 4 t and 1 L"]),
        ("tt|tt", {}, ["must be E (embedding)", "then L (loss)", "set it to null, or for example to 'Ett|ttL'"]),
        ("ttE|ttL", {}, ["must be E"]),
        ("Ett|tt", {}, ["then L"]),
        ("Ett||ttL", {"size": 3}, ["empty stage"]),
        ("EttttL", {"size": 1}, ["pipeline_model_parallel_size > 1"]),
        (None, {"size": 3}, ["4 layers", "3 pipeline stages", "parallel.pipeline_model_parallel_layout", "'Et|tt|tL'"]),
        ("E|ttttL", {"recompute_granularity": "full", "recompute_num_layers": 5}, ["recompute_num_layers=5", "the 4"]),
        ("Et|tttL", {"recompute_granularity": "full", "recompute_num_layers": 2}, ["does not divide the 1 layers"]),
    ],
)
def test_what_does_not_fit_is_one_line(text: str | None, more: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        check_layout(TINY, parallel(text, **more))
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_groups_of_layers_that_do_not_divide_a_stage_are_refused_without_a_layout_too() -> None:
    """Megatron would ask for a layer behind the last one."""
    with pytest.raises(UserError, match="recompute_num_layers=3 does not divide the 4 layers"):
        check_layout(TINY, ParallelConfig(recompute_granularity="full", recompute_num_layers=3))
    check_layout(TINY, ParallelConfig(recompute_granularity="full", recompute_num_layers=3, recompute_method="block"))


@given(st.integers(2, 200), st.integers(2, 200))
def test_the_suggested_layout_fits_and_is_balanced(num_layers: int, count: int) -> None:
    if count > num_layers:
        return
    text = balanced_layout(num_layers, count)
    assert sum(stage_layers(num_layers, parallel(text, count))) == num_layers
    units = [len(stage) for stage in parse_layout(text)]
    assert max(units) - min(units) <= 1

"""The shares of padding, waiting and uneven work: today's rules are better than the simple ones, by exact figures."""

import pytest
from click.testing import CliRunner

from tools.benchmarks.packing_shares import bubble_shares, main, padding_shares, pass_shares, uneven_work


@pytest.mark.parametrize(("tp", "cp", "most"), [(8, 16, 0.005), (8, 1, 0.001)])
def test_padding_for_context_parallelism_alone_is_smaller(tp: int, cp: int, most: float) -> None:
    before, after = padding_shares(tp, cp)
    assert after < min(most, before)


def test_a_pipeline_with_one_pack_waits_as_the_formula_says_and_less_with_more_packs() -> None:
    (one, most), (several, least) = bubble_shares(4)
    assert one == 1 and most == pytest.approx(3 / 4)
    assert several == 8 and 3 / (8 + 3) <= least < 0.3


@pytest.mark.parametrize(("length", "waiting"), [(8192, 0.8), (32768, 0.5)])
def test_a_pass_over_the_data_keeps_its_pipeline_at_work(length: int, waiting: float) -> None:
    few, wanted, streaming = pass_shares(8, length)
    assert few < 1 - waiting < wanted < 0.75 and streaming > 0.95


def test_ranks_that_share_flops_do_equal_work() -> None:
    by_squares, by_flops = uneven_work("llama-3.1-8b", 4096, 32768)
    assert min(by_squares) > 1.1 and max(by_flops) < 1.01


def test_the_command_prints_its_four_tables() -> None:
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 0, result.output
    assert result.output.count("## ") == 4 and "llama-3.1-70b, 8K to 32K" in result.output

"""More chunks make the output weight's gradient in bfloat16 no worse; a sum in bfloat16 does get worse."""

from tests.ranks import layout
from tools.benchmarks.head_precision import errors


def test_the_error_stays_with_a_sum_in_fp32() -> None:
    with layout() as groups:
        whole, _ = errors(4096, groups)
        summed, plain = errors(256, groups)
    assert whole < 0.002 and summed < 0.003 < plain

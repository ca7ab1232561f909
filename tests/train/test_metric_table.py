"""Sums of a report become means: of each source, and of all rows that have a metric."""

from megatron_solopo.train.metric_table import MetricTable

TABLE = MetricTable([("a", ("loss", "gap")), ("b", ("loss",))])


def test_a_metric_is_the_mean_over_the_rows_that_have_it() -> None:
    assert TABLE.size == 3
    assert TABLE.means([6.0, 3.0, 8.0], [3, 1]) == {
        "loss": 3.5,
        "gap": 1.0,
        "source/a/loss": 2.0,
        "source/a/gap": 1.0,
        "source/b/loss": 8.0,
    }


def test_a_source_without_rows_has_no_mean() -> None:
    found = TABLE.means([0.0, 0.0, 8.0], [0, 2])
    assert found == {"loss": 4.0, "gap": None, "source/a/loss": None, "source/a/gap": None, "source/b/loss": 4.0}


def test_the_only_source_has_no_name() -> None:
    assert MetricTable([("", ("loss", "gap"))]).means([6.0, 3.0], [3]) == {"loss": 2.0, "gap": 1.0}

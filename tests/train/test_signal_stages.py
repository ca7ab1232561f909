"""Many ranks agree on a request to stop in stages of small groups, and stop at the same place."""

from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_solopo.train import signals
from megatron_solopo.train.signals import Stopped, StopSignals, stages_of
from tests.ranks import two_ranks


@pytest.mark.parametrize("ranks", [1, 2, 8, 24, 64, 296, 1024, 2048])
def test_a_number_of_any_rank_reaches_all(ranks: int) -> None:
    stages = stages_of(ranks)
    known = {0}
    for stage in stages:
        assert sorted(rank for group in stage for rank in group) == list(range(ranks))
        known = {rank for group in stage if known & set(group) for rank in group}
    assert known == set(range(ranks))
    assert all(len(group) <= 32 or ranks % 37 == 0 for stage in stages for group in stage)
    assert all(later > earlier for stage in stages for group in stage for earlier, later in pairwise(group))


def on_two_ranks() -> dict[str, Any]:
    """Rank 1 is asked to stop before point 1; two stages, as 1,024 ranks have them."""
    stages = [dist.new_group([0, 1], backend="gloo"), dist.new_group([0, 1], backend="gloo")]
    found = {}
    for name in ("check", "check_meanwhile"):
        with StopSignals() as asked, mock.patch.object(signals, "_gloo_groups", lambda: stages):
            with mock.patch.object(dist, "get_backend", lambda: "nccl"):
                asked.join()
            point = 0
            try:
                for point in range(10):
                    if dist.get_rank() == point == 1:
                        asked._requests.received = 15
                    getattr(asked, name)()
            except Stopped as stopped:
                found[name] = point, str(stopped)
            asked.conclude()
            asked.leave()
    return found


def test_both_ranks_stop_at_the_same_point() -> None:
    """A check that does not wait begins an agreement at point 2, after the one of point 0, and has it at point 4."""
    said = "SIGTERM on rank 1"
    assert two_ranks(__name__) == [{"check": (1, said), "check_meanwhile": (4, said)}] * 2

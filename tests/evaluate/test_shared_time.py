"""Seconds of samples that are generated side by side add up to the wall time."""

import asyncio
import time

import pytest

from megatron_solopo.evaluate.generation import Answer, Generated
from megatron_solopo.evaluate.megatron_model import _sharing_time
from megatron_solopo.evaluate.samples import Sample, Spec
from megatron_solopo.evaluate.server_model import GreedySettings, ServerModel


def test_requests_side_by_side_share_the_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(*request: object) -> Answer:
        await asyncio.sleep(0.1)
        return Answer("", 1, "stop")

    monkeypatch.setattr(ServerModel, "_ask", slow)
    settings = GreedySettings("http://localhost:1/v1", "name", 8, 1.0, 0, None)
    specs = [Spec(str(number), "task", 8, None, 8, 1, number) for number in range(8)]
    kept: list[Generated] = []
    start = time.perf_counter()
    ServerModel(settings, None).run([specs], lambda spec: Sample(spec, "", ("x",)), kept.extend)  # type: ignore[arg-type]
    elapsed = time.perf_counter() - start
    assert len(kept) == 8 and 0.09 < sum(each.seconds for each in kept) <= elapsed


def test_data_parallel_ranks_share_the_slowest_ones_time() -> None:
    def answer(seconds: float) -> Generated:
        return Generated(
            question_id="q", index=0, text="", finish_reason="stop", answers=["x"], tokens=1, seconds=seconds
        )

    shared = _sharing_time([[answer(1.0), answer(1.0)], [answer(3.0)], []])
    assert [each.seconds for each in shared] == [1.0, 1.0, 1.0]

"""Pipeline stages send tensors alone: half the messages, no wait for the device, the same losses and gradients."""

from typing import Any

import pytest
import torch

from tests.ranks import two_ranks
from tools.benchmarks.pipeline_messages import CASES, Counted, run_step

pytestmark = pytest.mark.parity

NUM_PACKS, SHAPE_BYTES = 8, 3 * 8


def on_two_ranks() -> dict[str, list[Counted]]:
    """By case: with Megatron's own communicator, and with ours."""
    return {
        name: [run_step(sizes, forward_only=forward_only, shapes=shapes) for shapes in (True, False)]
        for name, (sizes, forward_only) in CASES.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_half_of_the_messages_are_left(name: str) -> None:
    boundaries = 3 if "VPP2" in name else 1
    directions = 1 if "forward only" in name else 2
    found: list[Any] = [rank[name] for rank in two_ranks(__name__)]
    sent = {shapes: sum(rank[not shapes].messages for rank in found) for shapes in (True, False)}
    assert sent == {False: NUM_PACKS * boundaries * directions, True: 2 * sent[False]}
    size = {shapes: sum(rank[not shapes].message_bytes for rank in found) for shapes in (True, False)}
    assert size[True] - size[False] == sent[False] * SHAPE_BYTES
    for theirs, ours in found:
        assert ours.device_waits == 0 < theirs.device_waits


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_the_same(name: str) -> None:
    found = [rank[name] for rank in two_ranks(__name__)]
    assert len(found[1][0].losses) == NUM_PACKS and not found[0][0].losses, "the last stage has the losses"
    for theirs, ours in found:
        assert theirs.losses == ours.losses and len(theirs.gradients) == len(ours.gradients)
        assert all(torch.equal(one, two) for one, two in zip(theirs.gradients, ours.gradients, strict=True))
        assert bool(ours.gradients) != ("forward only" in name)
        assert not ours.gradients or any(bool(gradient.any()) for gradient in ours.gradients)

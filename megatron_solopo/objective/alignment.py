"""SoLo-RA, the short-to-long reward alignment of SoLoPO (arXiv 2505.11166)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

Distance = Literal["l1", "l2", "huber"]

DISTANCES: dict[Distance, Callable[[Tensor, float], Tensor]] = {
    "l1": lambda gap_T, _: gap_T.abs(),
    "l2": lambda gap_T, _: gap_T.square(),
    "huber": lambda gap_T, delta: huber_loss(gap_T, torch.zeros_like(gap_T), reduction="none", delta=delta),
}


def alignment_distance(
    short_reward_T: Tensor, long_reward_T: Tensor, distance: Distance, huber_delta: float, detach_short: bool
) -> Tensor:
    """s(g) of the gap g = r(x_short, y) - r(x_long, y) of one response, `[T]`, not yet weighted by alpha.

    - l1: |g|, the paper's; with a logistic pair loss it bounds the pair loss of the long context.
    - l2: g**2, the bound for a squared pair loss.
    - huber: g**2 / 2 up to `huber_delta`, then huber_delta * (|g| - huber_delta / 2).

    With `detach_short` the gradient reaches the long reward alone: a gap is then closed by raising (or lowering)
    the long side, never by giving up what the short side has learned.
    """
    target_T = short_reward_T.detach() if detach_short else short_reward_T
    return DISTANCES[distance](target_T - long_reward_T, huber_delta)

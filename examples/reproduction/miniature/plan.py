"""Which runs there are."""

from collections.abc import Iterator, Sequence
from itertools import product

from miniature.runs import LEARNING_RATE, Run

WEAK, MIDDLE, STRONG = STRENGTHS = (45, 75, 95)
"""Short accuracy of the bases, in percent."""
SEEDS = (0, 1, 2)
LOSS_TYPES = ("simpo", "dpo", "orpo")
DEFAULT_ALPHA = {"simpo": 1.0, "dpo": 3.0, "orpo": 1.0}
"""The paper's."""
ALPHAS = (0.0, 0.3, 1.0, 3.0, 10.0)
MAP_ALPHAS = (1.0, 3.0, 10.0)
HIGH_RATE = 2 * LEARNING_RATE
"""Of the failures from the weak base, besides the learning rate of all other runs."""
LORA_RANKS = (1, 4, 16)
LORA_RATES = tuple(factor * LEARNING_RATE for factor in (1, 3, 10))
"""Tried on the first seed, with the first loss and the last two methods."""
LORA_RATE = LORA_RATES[1]
"""The one chosen."""
TOKEN_WEIGHTS = (1.0, 3.0)
LORA_LOSS_TYPES = ("simpo", "orpo")
LORA_METHODS = ("short_po", "long_po", "solopo")


def all_runs() -> list[Run]:
    """Every run once, what matters most first."""
    first, *others = SEEDS
    order = [comparison(seed) for seed in SEEDS]
    order += [alphas(first), failures(first, WEAK), failures(first, STRONG), failures(first, WEAK, HIGH_RATE)]
    order += [alphas(seed) for seed in others]
    order += [failures(seed, WEAK, rate) for rate in (HIGH_RATE, LEARNING_RATE) for seed in others]
    order += [failures(first, MIDDLE)] + [failures(seed, strength) for strength in (STRONG, MIDDLE) for seed in others]
    order += [lora_trial(rate) for rate in LORA_RATES] + [lora(seed, LORA_RATE) for seed in SEEDS]
    order += [tokens(seed) for seed in SEEDS]
    return list(dict.fromkeys(run for part in order for run in part))


def comparison(seed: int) -> Iterator[Run]:
    """The methods side by side, from the strong base."""
    yield Run(STRONG, seed, "base")
    for loss_type in LOSS_TYPES:
        yield from pairs_alone(STRONG, seed, loss_type)
        for align in ("chosen", "both"):
            yield Run(STRONG, seed, "solopo", loss_type, DEFAULT_ALPHA[loss_type], align)


def pairs_alone(strength: int, seed: int, loss_type: str, rate: float = LEARNING_RATE) -> Iterator[Run]:
    """What SoLoPO is compared with."""
    for method in ("short_po", "long_po"):
        yield Run(strength, seed, method, loss_type, learning_rate=rate)


def alphas(seed: int) -> Iterator[Run]:
    """Weights of the alignment, from the strong base."""
    for loss_type in LOSS_TYPES:
        for alpha in ALPHAS:
            yield Run(STRONG, seed, "solopo", loss_type, alpha)


def failures(seed: int, strength: int, rate: float = LEARNING_RATE) -> Iterator[Run]:
    """Loss type and alpha from one base, with and without `detach_short`, beside what has no alignment."""
    yield Run(strength, seed, "base")
    for loss_type in LOSS_TYPES:
        yield from pairs_alone(strength, seed, loss_type, rate)
        for alpha in MAP_ALPHAS:
            for detached in (False, True):
                yield Run(strength, seed, "solopo", loss_type, alpha, "chosen", detached, rate)


def tokens(seed: int) -> Iterator[Run]:
    """The divergence per token, alone and beside the alignment of rewards, from the strong base."""
    for alpha, weight in product((0.0, DEFAULT_ALPHA["simpo"]), TOKEN_WEIGHTS):
        yield Run(STRONG, seed, "solopo", "simpo", alpha, token_weight=weight)


def lora(
    seed: int, rate: float, loss_types: Sequence[str] = LORA_LOSS_TYPES, methods: Sequence[str] = LORA_METHODS
) -> Iterator[Run]:
    """Adapters of several ranks, from the strong base."""
    for loss_type, rank, method in product(loss_types, LORA_RANKS, methods):
        alpha = DEFAULT_ALPHA[loss_type] if method == "solopo" else None
        yield Run(STRONG, seed, method, loss_type, alpha, learning_rate=rate, rank=rank)


def lora_trial(rate: float) -> Iterator[Run]:
    """The runs that chose the learning rate of all adapters."""
    return lora(SEEDS[0], rate, LORA_LOSS_TYPES[:1], LORA_METHODS[1:])

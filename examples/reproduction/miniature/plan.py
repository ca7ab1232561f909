"""Which runs there are."""

from collections.abc import Iterator

from miniature.runs import Run

WEAK, MIDDLE, STRONG = STRENGTHS = (45, 75, 95)
"""Short accuracy of the bases, in percent."""
SEEDS = (0, 1, 2)
LOSS_TYPES = ("simpo", "dpo", "orpo")
DEFAULT_ALPHA = {"simpo": 1.0, "dpo": 3.0, "orpo": 1.0}
"""The paper's."""
ALPHAS = (0.0, 0.3, 1.0, 3.0, 10.0)
MAP_ALPHAS = (1.0, 3.0, 10.0)


def all_runs() -> list[Run]:
    """Every run once, what matters most first."""
    first, *others = SEEDS
    order = [comparison(seed) for seed in SEEDS] + [alphas(first), failures(first)]
    order += [part(seed) for part in (alphas, failures) for seed in others]
    return list(dict.fromkeys(run for part in order for run in part))


def comparison(seed: int) -> Iterator[Run]:
    """The methods side by side, from the strong base."""
    yield Run(STRONG, seed, "base")
    for loss_type in LOSS_TYPES:
        yield from pairs_alone(STRONG, seed, loss_type)
        for align in ("chosen", "both"):
            yield Run(STRONG, seed, "solopo", loss_type, DEFAULT_ALPHA[loss_type], align)


def pairs_alone(strength: int, seed: int, loss_type: str) -> Iterator[Run]:
    """What SoLoPO is compared with."""
    yield Run(strength, seed, "short_po", loss_type)
    yield Run(strength, seed, "long_po", loss_type)


def alphas(seed: int) -> Iterator[Run]:
    """Weights of the alignment, from the strong base."""
    for loss_type in LOSS_TYPES:
        for alpha in ALPHAS:
            yield Run(STRONG, seed, "solopo", loss_type, alpha)


def failures(seed: int) -> Iterator[Run]:
    """Base strength, loss type and alpha, with and without `detach_short`."""
    for strength in (WEAK, STRONG, MIDDLE):
        yield Run(strength, seed, "base")
        for loss_type in LOSS_TYPES:
            yield from pairs_alone(strength, seed, loss_type)
            for alpha in MAP_ALPHAS:
                yield Run(strength, seed, "solopo", loss_type, alpha)
                yield Run(strength, seed, "solopo", loss_type, alpha, detach_short=True)

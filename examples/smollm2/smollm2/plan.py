"""Which runs there are, and their sizes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SEEDS = (0, 1, 2)
METHODS = ("short_po", "long_po", "solopo")
RATES = {"full": 3e-5, "lora": 3e-4}
"""Of the whole model and of adapters."""
TRIAL_RATES = (1e-5, 1e-4)
"""Tried on the first seed beside that of the whole model. RESULTS.md shows the accuracy on the dev split."""
BASE = "base"
DEV, NEEDLES = "dev", "needles"


@dataclass(frozen=True)
class Sizes:
    """How much is done. `--quick` shows the whole way in minutes; its accuracies mean nothing."""

    name: str
    seeds: tuple[int, ...]
    short_tokens: int
    long_tokens: int
    triplets: int
    batch: int
    samples: int
    """Responses of the model to a short context."""
    train_questions: int | None
    """The first of the split; None: all."""
    test_questions: int | None
    dev_questions: int | None
    lengths: tuple[int, ...]
    """Of test contexts, in tokens with the instruction and room for the answer. The first is `short_tokens`."""
    needle_lengths: tuple[int, ...]
    needle_samples: int

    @property
    def steps(self) -> int:
        """Of the optimizer; every triplet is read once."""
        return self.triplets // self.batch


FULL = Sizes("full", SEEDS, 400, 2048, 28, 4, 16, 64, 48, 24, (400, 1024, 2048, 4096), (1024, 2048, 4096), 5)
QUICK = Sizes("quick", SEEDS[:1], 400, 640, 3, 1, 8, 14, 2, 2, (400, 640), (512,), 1)


@dataclass(frozen=True)
class Run:
    """What is trained."""

    method: str
    """base (nothing is trained), short_po, long_po, solopo."""
    seed: int = 0
    """Of the choice among the responses, and of the order of the triplets."""
    loss_type: str = "simpo"
    align: str = "chosen"
    weights: str = "full"
    """full: the whole model. lora: adapters of rank 16."""
    learning_rate: float | None = None
    """None: that of `RATES`."""

    @property
    def name(self) -> str:
        """Unique, and fit for a folder."""
        if self.method == BASE:
            return BASE
        both = "-both" if self.align == "both" else ""
        lora = "" if self.weights == "full" else f"-{self.weights}"
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        return f"{self.loss_type}-{self.method}{both}{lora}{rate}-seed{self.seed}"

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or RATES[self.weights]

    @property
    def is_trial(self) -> bool:
        """Whether the run only helps to choose the learning rate: it answers the questions of the dev split alone."""
        return self.learning_rate is not None

    def overrides(self, sizes: Sizes) -> list[str]:
        """What the run changes in config.yaml."""
        changed: dict[str, Any] = {
            "seed": self.seed,
            "objective.name": self.method,
            "objective.loss_type": self.loss_type,
            "objective.align": self.align,
            "objective.beta": 2.5 if self.loss_type == "simpo" else 0.1,
            "optimizer.lr": f"{self.rate:.1e}",
            "training.max_steps": sizes.steps,
            "training.global_batch_size": sizes.batch,
        }
        if self.weights == "lora":
            changed |= {"lora.rank": 16}
        return [f"{key}={value}" for key, value in changed.items()]

    def parts(self, sizes: Sizes) -> list[str]:
        """What the run is measured on, what matters most first: lengths of the test split, `dev`, `needles`.

        The ends of the training lengths come before the lengths between and beyond them.
        """
        if self.is_trial:
            return [DEV]
        first = (sizes.lengths[0], sizes.long_tokens)
        others = [length for length in sizes.lengths if length not in first]
        return [*(test_part(length) for length in first), DEV, *map(test_part, others), NEEDLES]


def test_part(length: int) -> str:
    """The questions of the test split in contexts of this length."""
    return f"test-{length}"


def comparison(seed: int, loss_type: str = "simpo", weights: str = "full") -> list[Run]:
    """The methods side by side."""
    return [Run(method, seed, loss_type, weights=weights) for method in METHODS]


def groups(sizes: Sizes, *, everything: bool) -> Iterator[list[Run]]:
    """Groups of runs to finish one after the other: the main comparison by seed, then whatever else there is.

    The main comparison is what `make smollm2` runs.
    """
    for seed in sizes.seeds:
        yield [Run(BASE), *comparison(seed)] if seed == sizes.seeds[0] else comparison(seed)
    if everything:
        yield [Run(method, learning_rate=rate) for rate in TRIAL_RATES for method in METHODS]
        yield [Run("solopo", align="both")]
        yield from (comparison(SEEDS[0], loss_type) for loss_type in ("orpo", "dpo"))
        yield comparison(SEEDS[0], weights="lora")

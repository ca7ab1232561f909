"""Which runs there are, and their sizes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SEEDS = (0, 1, 2)
METHODS = ("short_po", "long_po", "solopo")
RATES = {"full": 3e-5, "lora": 3e-4}
"""Of the whole model and of adapters."""
LONG_RUN = 4
"""So many times as many steps: `short_po` then takes about the FLOPs of the comparison's `solopo` (52.8 and 48.3 T)."""
LONGER = (2048, 4096)
"""Other lengths of the long contexts of training."""
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
    dev_tokens: int
    """Of the long contexts of the dev split; its short ones have `short_tokens`."""
    lengths: tuple[int, ...]
    """Of test contexts, in tokens with the instruction and room for the answer. The first is `short_tokens`."""
    needle_lengths: tuple[int, ...]
    needle_samples: int
    trial_rates: tuple[float, ...]
    """Learning rates that `short_po` tries on the dev split beside that of the comparison."""


FULL = Sizes(
    name="full",
    seeds=SEEDS,
    short_tokens=400,
    long_tokens=1024,
    triplets=48,
    batch=4,
    samples=16,
    train_questions=None,
    test_questions=48,
    dev_questions=None,
    dev_tokens=2048,
    lengths=(400, 1024, 2048, 4096, 8192),
    needle_lengths=(1024, 2048, 4096),
    needle_samples=5,
    trial_rates=(1e-5, 1e-4),
)
QUICK = Sizes(
    name="quick",
    seeds=SEEDS[:1],
    short_tokens=400,
    long_tokens=640,
    triplets=3,
    batch=1,
    samples=8,
    train_questions=14,
    test_questions=2,
    dev_questions=2,
    dev_tokens=640,
    lengths=(400, 640),
    needle_lengths=(512,),
    needle_samples=1,
    trial_rates=(),
)


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
    step_factor: int = 1
    """So many times the steps of the comparison."""
    long_tokens: int | None = None
    """Of the long contexts of training. None: those of `Sizes`."""

    @property
    def name(self) -> str:
        """Unique, and fit for a folder."""
        if self.method == BASE:
            return BASE
        both = "-both" if self.align == "both" else ""
        lora = "" if self.weights == "full" else f"-{self.weights}"
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        longer = "" if self.step_factor == 1 else f"-{self.step_factor}x"
        long = "" if self.long_tokens is None else f"-long{self.long_tokens}"
        return f"{self.loss_type}-{self.method}{both}{lora}{rate}{longer}{long}-seed{self.seed}"

    @property
    def triplets(self) -> str:
        """Name of the triplets that the run reads."""
        return f"seed{self.seed}" if self.long_tokens is None else f"seed{self.seed}-long{self.long_tokens}"

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or RATES[self.weights]

    @property
    def is_trial(self) -> bool:
        """Whether the run only helps to choose the learning rate: it answers the questions of the dev split alone."""
        return self.learning_rate is not None

    def steps(self, sizes: Sizes) -> int:
        """Of the optimizer."""
        return self.step_factor * sizes.triplets // sizes.batch

    def overrides(self, sizes: Sizes) -> list[str]:
        """What the run changes in config.yaml."""
        changed: dict[str, Any] = {
            "seed": self.seed,
            "objective.name": self.method,
            "objective.loss_type": self.loss_type,
            "objective.align": self.align,
            "objective.beta": 2.5 if self.loss_type == "simpo" else 0.1,
            "optimizer.lr": f"{self.rate:.1e}",
            "training.max_steps": self.steps(sizes),
            "training.global_batch_size": sizes.batch,
        }
        if self.weights == "lora":
            changed |= {"lora.rank": 16}
        if self.long_tokens is not None:
            changed |= {"data.max_tokens_per_pack": self.long_tokens + 1024}  # one triplet
        return [f"{key}={value}" for key, value in changed.items()]

    def main_parts(self, sizes: Sizes) -> list[str]:
        """What a run of any seed is measured on: the lengths of training. Of a trial, the dev split alone."""
        lengths = dict.fromkeys((sizes.short_tokens, sizes.long_tokens, self.long_tokens or sizes.long_tokens))
        return [DEV] if self.is_trial else [test_part(length) for length in lengths]

    def parts(self, sizes: Sizes) -> list[str]:
        """All that the run is measured on: `main_parts`, and what shows where accuracy ends.

        The base answers everything. The first seed of the comparison and the runs with more steps also answer contexts
        of twice the length of training. `needles` go to the base and to the runs with more steps.
        """
        main = self.main_parts(sizes)
        is_base, has_more_steps = self == Run(BASE), self in comparison(step_factor=LONG_RUN)
        longest = sizes.lengths[-1] if is_base else 2 * sizes.long_tokens
        is_wide = is_base or has_more_steps or self in comparison()
        lengths = [test_part(length) for length in sizes.lengths if is_wide and length <= longest]
        # The rate of the comparison beside those of the trials.
        dev = [DEV] if is_base or self == Run("short_po") else []
        needles = [NEEDLES] if is_base or has_more_steps else []
        return list(dict.fromkeys([*main, *dev, *lengths, *needles]))


def test_part(length: int) -> str:
    """The questions of the test split in contexts of this length."""
    return f"test-{length}"


def comparison(seed: int = SEEDS[0], **settings: Any) -> list[Run]:
    """The methods side by side. `settings` are fields of a run."""
    return [Run(method, seed, **settings) for method in METHODS]


def main_groups(sizes: Sizes) -> Iterator[list[Run]]:
    """What `make smollm2` runs: the trials of learning rates, then the comparison."""
    yield [Run("short_po", learning_rate=rate) for rate in sizes.trial_rates]
    yield [Run(BASE), *(run for seed in sizes.seeds for run in comparison(seed))]


def groups(sizes: Sizes, *, everything: bool) -> Iterator[list[Run]]:
    """Groups of runs to finish one after the other."""
    yield from main_groups(sizes)
    if everything:
        yield [Run("solopo", align="both"), *comparison(step_factor=LONG_RUN)]
        yield from (comparison(loss_type=loss_type) for loss_type in ("orpo", "dpo"))
        yield comparison(weights="lora")
        yield [Run(method, long_tokens=long) for long in LONGER for method in ("long_po", "solopo")]

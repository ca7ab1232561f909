"""The ways to run TRL's trainer, and which of them are worth a try at which length."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

import torch

from megatron_solopo.errors import UserError
from tools.benchmarks.bench_case import NOT_TRIED, OK, OUT_OF_MEMORY, TRL, Measurement


@dataclass(frozen=True)
class Variant:
    """One way to run TRL."""

    attention: str
    """sdpa; cudnn: sdpa that prefers cuDNN's kernel; flash_attention_2."""
    liger: bool
    checkpointing: bool

    @property
    def implementation(self) -> str:
        """In transformers' words."""
        return "sdpa" if self.attention == "cudnn" else self.attention

    def needs_no_less_memory_than(self, other: "Variant") -> bool:
        """Liger's layers and checkpointing both save memory; attention kernels differ too much to be told apart."""
        same_attention = self.attention == other.attention
        return same_attention and self.liger <= other.liger and self.checkpointing <= other.checkpointing

    def __str__(self) -> str:
        parts = [self.attention, *(["liger"] if self.liger else []), *(["checkpointing"] if self.checkpointing else [])]
        return "+".join(parts)


def possible_variants(wanted: Sequence[str]) -> list[Variant]:
    """All combinations that this machine can run, or of these the wanted ones.

    Raises UserError for a wanted one that is not among them.
    """
    attentions = ["sdpa"]
    if torch.cuda.is_available():
        attentions.append("cudnn")
        attentions += ["flash_attention_2"] if importlib.util.find_spec("flash_attn") else []
    liger = [False, True] if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") else [False]
    variants = {str(each := Variant(*values)): each for values in product(attentions, liger, (False, True))}
    if unknown := sorted(set(wanted) - set(variants)):
        raise UserError(f"--trl-variant {unknown[0]}: this machine can run {', '.join(variants)}")
    return [each for name, each in variants.items() if name in wanted or not wanted]


class Search:
    """Which variants are still worth a try, in which order."""

    def __init__(self, candidates: Sequence[Variant], measure: Callable[[Variant, int, float], Measurement]) -> None:
        """`measure(variant, long_tokens, fastest)`: the last is the best median of a step so far, in seconds."""
        self.candidates, self._measure = list(candidates), measure

    def measure(self, long_tokens: int, *, every_variant: bool) -> Measurement:
        """The fastest variant that survives this length, or why there is none."""
        if not self.candidates:
            return Measurement(TRL, long_tokens, NOT_TRIED, "no variant survived a shorter length")
        out: list[Variant] = []
        measured: dict[Variant, Measurement] = {}
        best: Measurement | None = None
        for variant in self.candidates:
            if any(variant.needs_no_less_memory_than(other) for other in out):
                continue
            fastest = median(best.seconds) if best else float("inf")
            result = self._measure(variant, long_tokens, fastest)
            if result.status == OK:
                measured[variant] = result
                if best is None or median(result.seconds) < fastest:
                    best = result
                if not every_variant:
                    break
            elif result.status == OUT_OF_MEMORY:
                out.append(variant)
            else:
                self.candidates = [each for each in self.candidates if each != variant]
            last = result
        self._drop(out)
        if every_variant:
            self.candidates.sort(key=lambda variant: median(measured[variant].seconds))
        return best or last

    def _drop(self, out: Sequence[Variant]) -> None:
        self.candidates = [
            each for each in self.candidates if not any(each.needs_no_less_memory_than(other) for other in out)
        ]

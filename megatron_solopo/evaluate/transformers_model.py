"""Generation by transformers, on a Hugging Face directory."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.evaluate.generation import Keep, MakeSample, built, generate_batch
from megatron_solopo.evaluate.samples import Spec
from megatron_solopo.generate.transformers import end_tokens, load_transformers_model
from megatron_solopo.parallel.cpu import is_cpu

# The library's class is not typed.
_GENERATION_CONFIG: Any = GenerationConfig


class TransformersModel:
    """See `generation.Generator` and `generation.LocalModel`."""

    layout: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, path: Path, tokenizer: Tokenizer, dtype: str) -> None:
        self._device = torch.device("cpu" if is_cpu() else "cuda")
        self.device = described_device(self._device)
        self._tokenizer = tokenizer
        self._ends = end_tokens(path, tokenizer)
        self._model: Any = load_transformers_model(path, dtype).to(self._device)
        # What the model's own file says of sampling or penalties is not greedy generation.
        self._model.generation_config = _GENERATION_CONFIG()

    def run(self, batches: Sequence[Sequence[Spec]], build: MakeSample, keep: Keep) -> None:
        """One batch after the other."""
        for batch in batches:
            keep(generate_batch(self, built(batch, build), self._tokenizer, self._ends, self._device))

    def greedy(self, prompts_BT: Tensor, max_new_tokens: int, ends: Collection[int]) -> Tensor:
        """See `generation.LocalModel`."""
        settings = _GENERATION_CONFIG(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
        )
        with torch.inference_mode():
            whole: Tensor = self._model.generate(
                prompts_BT, attention_mask=torch.ones_like(prompts_BT), generation_config=settings
            )
        return whole[:, prompts_BT.shape[1] :]


def described_device(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

"""Responses from a Hugging Face model in this process."""

from collections import Counter
from typing import Any

import torch
from transformers import GenerationConfig

from megatron_solopo.data.encode import encode_prompt, template_of
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.generate.model import Answer, Request
from megatron_solopo.generate.transformers import end_tokens, load_transformers_model
from megatron_solopo.triplets.settings import SampleSettings

# The library's class is not typed.
_GENERATION_CONFIG: Any = GenerationConfig


class HuggingFaceSampler:
    """A model directory; see `data.sample_model.Model`.

    A request's samples are one batch, whose random numbers come from the request's seed: what is drawn does not depend
    on what was drawn before, nor on a restart.
    """

    concurrency = 1

    def __init__(self, settings: SampleSettings) -> None:
        self.retried: Counter[str] = Counter()
        self._settings = settings
        self._tokenizer = load_tokenizer(settings.model)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_transformers_model(settings.model).to(self._device)
        self._ends = end_tokens(settings.model, self._tokenizer)
        # What the model's own file says of top_k or penalties would change the distribution.
        self._model.generation_config = _GENERATION_CONFIG()

    async def ask(self, request: Request) -> list[Answer]:
        """All samples of a request."""
        torch.manual_seed(request.seed)
        ids = encode_prompt(request.prompt, self._tokenizer, template_of(request.prompt))
        prompt = torch.tensor([ids], device=self._device)
        with torch.inference_mode():
            output = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=self._generation(request),
            )
        return [self._answer(row) for row in output[:, prompt.shape[1] :].tolist()]

    async def aclose(self) -> None:
        """Nothing to give back."""

    def _generation(self, request: Request) -> Any:
        return _GENERATION_CONFIG(
            do_sample=True,
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            top_k=0,
            max_new_tokens=request.max_tokens,
            num_return_sequences=len(request.indices),
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=min(self._ends, default=0),
        )

    def _answer(self, tokens: list[int]) -> Answer:
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        text = self._tokenizer.decode(tokens[:end])
        return Answer(text, "length" if end is None else "stop")

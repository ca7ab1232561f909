"""Models in this process: what they share, and Hugging Face directories, loaded without running code from them."""

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.utils import logging

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.architecture.model_directory import huggingface_directory, is_megatron_checkpoint
from megatron_solopo.architecture.one_reading import check_one_reading
from megatron_solopo.cpu_features import warn_about_slow_bfloat16
from megatron_solopo.data.end_tokens import end_tokens
from megatron_solopo.data.rendering import encode_prompt, template_of
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.generate.model import Answer, Answered, Build, Item, Keep, Refuse, Request, Traffic

# transformers' own are not typed.
_AUTO_MODEL: Any = AutoModelForCausalLM
_GENERATION_CONFIG: Any = GenerationConfig
_LOGGING: Any = logging


EncodedRequest = tuple[Request, list[int]]
"""A request and the token ids of its prompt."""


class LocalModel(ABC):
    """A model in this process or on this group of ranks, see `generate.model.Model`. Answers one batch at a time."""

    def __init__(
        self,
        path: Path | str,
        tokenizer: Tokenizer,
        end_tokens: Collection[int],
        device: torch.device,
        *,
        dtype: torch.dtype,
        vocab_size: int,
        max_positions: int | None,
    ) -> None:
        """`path` names the model in messages. Prompts must fit its vocabulary and its positions (None: not known)."""
        if dtype is torch.bfloat16 and device.type == "cpu":
            warn_about_slow_bfloat16("--dtype float32")
        self.traffic = Traffic()
        self._path, self._vocab_size, self._max_positions = path, vocab_size, max_positions
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._device = device

    @abstractmethod
    def generate(self, prompts_BT: Tensor, max_tokens: int, end_tokens: Collection[int]) -> Tensor:
        """int64 [B, n], the tokens behind equally long prompts; n is at most `max_tokens`.

        Generation stops once every row has one of `end_tokens`. What follows a row's first end token is arbitrary.
        """

    def answer(self, batches: Sequence[Sequence[Item]], build: Build[Item], keep: Keep, refuse: Refuse) -> None:
        """See `Model`. Building a prompt does not count in the seconds.

        Raises UserError for a prompt that does not fit the model.
        """
        for batch in batches:
            for request, answers, seconds in self.answer_batch(self.encode(build_all(batch, build))):
                keep(request, answers, seconds)

    def encode(self, requests: Sequence[Request]) -> list[EncodedRequest]:
        """Each request with the tokens of its prompt; raises UserError for a prompt that does not fit the model."""
        encoded = []
        for each in requests:
            ids = encode_prompt(each.prompt, self._tokenizer, template_of(each.prompt), each.arguments)
            promised = each.prompt_tokens
            assert promised in (None, len(ids)), f"{each.question_id}: {len(ids)} tokens, not {promised}"
            self._check(each, ids)
            encoded.append((each, ids))
        return encoded

    def _check(self, request: Request, ids: Sequence[int]) -> None:
        if max(ids) >= self._vocab_size:
            raise UserError(
                f"{self._path}: the prompt of {request.question_id} has the token id {max(ids)}, but the model has "
                f"embeddings for ids up to {self._vocab_size - 1}; use the model's own tokenizer"
            )
        needed = len(ids) + request.max_tokens
        if self._max_positions is not None and needed > self._max_positions:
            raise UserError(
                f"{self._path}: the prompt of {request.question_id} and its answer take up to {needed} tokens, but the "
                f"model has {self._max_positions} positions; ask for shorter answers, or use shorter contexts"
            )

    def answer_batch(self, encoded: Sequence[EncodedRequest]) -> list[Answered]:
        """Each request with its answers and seconds; the prompts must be equally long."""
        if not encoded:
            return []
        requests = [request for request, _ in encoded]
        prompts_BT = torch.tensor([ids for each, ids in encoded for _ in each.indices], device=self._device)
        start = time.perf_counter()
        rows = self.generate(prompts_BT, requests[0].max_tokens, self._end_tokens).tolist()
        seconds = (time.perf_counter() - start) / len(requests)
        answers = iter([answer_of(row, self._tokenizer, self._end_tokens) for row in rows])
        return [(each, [next(answers) for _ in each.indices], seconds) for each in requests]


class TransformersModel(LocalModel):
    """A Hugging Face directory.

    Args:
        path: Directory of the model; its own file of generation settings counts for its end tokens alone.
        dtype: Name of a torch dtype; auto: the one that the weights are stored in.
        temperature: 0 generates the most likely token each time. Above 0, answers are sampled, and a batch is one
            request: its random numbers come from its seed alone, whatever was sampled before.
        top_p: Sample from the most likely tokens that together have this probability.
    """

    def __init__(
        self,
        path: Path | str,
        tokenizer: Tokenizer,
        device: torch.device,
        dtype: str = "auto",
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> None:
        # First, as it says best what is wrong with a directory.
        self._model = load_transformers_model(path, dtype).to(device)
        super().__init__(
            path,
            tokenizer,
            end_tokens(path, tokenizer),
            device,
            dtype=self._model.dtype,
            vocab_size=self._model.get_input_embeddings().num_embeddings,
            max_positions=max_positions(Path(path)),
        )
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0}
        self._sampling = {"do_sample": True, **sampling} if temperature else {"do_sample": False}
        # Penalties or a top_k of the model's own file would change the distribution.
        self._model.generation_config = _GENERATION_CONFIG()

    def answer_batch(self, encoded: Sequence[EncodedRequest]) -> list[Answered]:
        """See `LocalModel`."""
        if self._sampling["do_sample"]:
            ((request, _),) = encoded
            torch.manual_seed(request.seed)
        return super().answer_batch(encoded)

    @torch.inference_mode()
    def generate(self, prompts_BT: Tensor, max_tokens: int, end_tokens: Collection[int]) -> Tensor:
        """See `LocalModel`."""
        settings = _GENERATION_CONFIG(
            max_new_tokens=max_tokens,
            eos_token_id=sorted(end_tokens) or None,
            pad_token_id=min(end_tokens, default=0),
            **self._sampling,
        )
        whole: Tensor = self._model.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            generation_config=settings,
            **self._prompt_cache(prompts_BT),
        )
        return whole[:, prompts_BT.shape[1] :]

    def _prompt_cache(self, prompts_BT: Tensor) -> dict[str, Any]:
        """Argument of `generate`: keys and values of a prompt that all rows share, up to its last token.

        The samples of one request share their prompt, which is then computed once. Empty if the rows differ, or if a
        layer keeps other states than keys and values of all tokens: transformers cannot repeat all of those.
        """
        rows, length = prompts_BT.shape
        if rows == 1 or length == 1 or not prompts_BT.eq(prompts_BT[0]).all():
            return {}
        expected = DynamicCache(config=self._model.config)
        if any(type(layer) is not DynamicLayer for layer in expected.layers):
            return {}
        output = self._model.base_model(prompts_BT[:1, :-1], use_cache=True)
        # transformers 5.24 gave it a new name, in outputs as in arguments.
        name = "cache" if "cache" in output else "past_key_values"
        cache = output.get(name)
        if type(cache) is not DynamicCache:  # a few old families have a class of their own
            return {}
        cache.batch_repeat_interleave(rows)
        return {name: cache}


def build_all(items: Iterable[Item], build: Build[Item]) -> list[Request]:
    """The requests of the items for which one can be made."""
    return [request for request in map(build, items) if request is not None]


def answer_of(tokens: Sequence[int], tokenizer: Tokenizer, end_tokens: Collection[int]) -> Answer:
    """An answer from a row of generated tokens, up to the first end token."""
    end = next((place for place, token in enumerate(tokens) if token in end_tokens), None)
    count = len(tokens) if end is None else end + 1
    return Answer(tokenizer.decode(tokens[:end]), "length" if end is None else "stop", count)


def load_transformers_model(path: Path | str, dtype: str = "auto") -> Any:
    """The causal language model on the CPU, in evaluation mode.

    Args:
        dtype: Name of a torch dtype; auto: the one that the weights are stored in.

    Raises UserError for a directory that holds no model, a damaged or incomplete one, weights that another loader reads
    differently, or numbers that are not finite.
    """
    check_one_reading(Path(path))
    shows_progress = _LOGGING.is_progress_bar_enabled()
    _LOGGING.disable_progress_bar()
    try:
        model, found = _AUTO_MODEL.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise _no_model(path, error) from None
    except RuntimeError as error:
        # Of tensors of other shapes. Others, such as a full GPU, say nothing about the directory.
        if "mismatched" not in str(error):
            raise
        raise _no_model(path, error) from None
    finally:
        if shows_progress:
            _LOGGING.enable_progress_bar()
    if found["missing_keys"]:
        raise _no_model(path, f"its weights lack {min(found['missing_keys'])}")
    for name, weight in model.named_parameters():
        if not all(bool(bound.isfinite()) for bound in weight.aminmax()):
            raise _no_model(path, f"{name} is not finite (NaN or infinity); the file is damaged: take another copy")
    return model.eval()


def max_positions(path: Path) -> int | None:
    """Positions that a model was made for; None where its config does not say."""
    try:
        return read_architecture(path).max_sequence_length
    except UserError:
        if is_megatron_checkpoint(path):
            raise
    # transformers runs other models than we do.
    config = AutoConfig.from_pretrained(huggingface_directory(path), local_files_only=True, trust_remote_code=False)
    return getattr(config, "max_position_embeddings", None)


def _no_model(path: Path | str, reason: object) -> UserError:
    return UserError(f"--model {path}: no loadable model: {' '.join(str(reason).split())}")

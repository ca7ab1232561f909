"""Generation by our own model under all layouts but context parallelism, with Megatron-Core's static key-value cache.

A batch of equally long prompts goes through in one piece, then one token at a time. Each pass uses Megatron's
forward-only schedule, which carries it over the pipeline's stages. Only the last position is projected to the
vocabulary. Rows that have ended run along until all have. Memory: the weights, the cache (2 x layers / PP x groups / TP
x head_dim x B x (prompt + answer) numbers) and the activations of one prompt, since a prompt is not cut into chunks.

Data-parallel ranks have rows of their own, which end at other places. Where they share experts, every rank must enter
each layer as often as the others, or these would wait for ever. So a rank that is done repeats its last pass, without
effect, until all are.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_solopo.checkpoint.load import load_weights
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.data.end_tokens import end_tokens
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.generate.model import Answered, Build, Item, Keep, Refuse
from megatron_solopo.generate.transformers import EncodedRequest, LocalModel, build_all
from megatron_solopo.model.build import build_model
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel.agreement import on_every_rank, on_rank_0
from megatron_solopo.parallel.megatron_internals import advance_cache, without_shape_messages
from megatron_solopo.parallel.topology import Topology

_LEAST_STEP = 64


class MegatronModel(LocalModel):
    """A Megatron checkpoint or Hugging Face directory, on all ranks together.

    Raises UserError for a layout that does not fit the model, or damaged weights.
    """

    def __init__(
        self, path: Path, tokenizer: Tokenizer, dtype: Any, parallel: ParallelConfig, topology: Topology
    ) -> None:
        model = resolve_model(ModelConfig(path=path, dtype=dtype), parallel)
        super().__init__(
            path,
            tokenizer,
            end_tokens(path, tokenizer),
            topology.device,
            dtype=getattr(torch, dtype),
            vocab_size=model.architecture.vocab_size,
            max_positions=model.architecture.max_sequence_length,
        )
        (self._model,) = build_model(model, chunk_tokens=1, device=topology.device)
        load_weights([self._model], model.architecture, path)
        self._model.eval()
        self._topology = topology
        experts = parallel.expert_model_parallel_size * parallel.expert_tensor_size
        # Otherwise ranks with the same experts have the same rows.
        self._shares_experts = parallel.tensor_model_parallel_size % experts != 0

    def answer(self, batches: Sequence[Sequence[Item]], build: Build[Item], keep: Keep, refuse: Refuse) -> None:
        """See `Model`. All ranks pass the same batches, and global rank 0 keeps the answers.

        Data-parallel ranks take batches in turn and wait for each other after each.
        """
        group = self._topology.data_group
        size, rank = group.size(), group.rank()
        for start in range(0, len(batches), size):
            batch = batches[start + rank] if start + rank < len(batches) else ()
            encoded = on_every_rank(partial(self._encode_batch, batch, build))
            answered = self.answer_batch(encoded)
            if not encoded and self._shares_experts:
                self.generate(torch.zeros(1, 1, dtype=torch.int64, device=self._device), 1, end_tokens=())
            # Nobody reads the prompts again, which may be long.
            own = [(replace(request, prompt=""), answers, seconds) for request, answers, seconds in answered]
            gathered: list[Any] = [None] * size
            dist.all_gather_object(gathered, own, group=group)
            on_rank_0(partial(_keep_all, keep, gathered))

    def _encode_batch(self, batch: Sequence[Item], build: Build[Item]) -> list[EncodedRequest]:
        return self.encode(build_all(batch, build))

    @torch.inference_mode()
    def generate(self, prompts_BT: Tensor, max_tokens: int, end_tokens: Collection[int]) -> Tensor:
        """See `LocalModel`. The most likely token each time, the same on every rank of the model.

        Data-parallel ranks that share experts call it together.
        """
        batch, length = prompts_BT.shape
        context = StaticInferenceContext(batch, _rounded(length + max_tokens))
        end_ids = torch.tensor(sorted(end_tokens), dtype=torch.int64, device=prompts_BT.device)
        ended_B = torch.zeros(batch, dtype=torch.bool, device=prompts_BT.device)
        tokens, generated = prompts_BT, list[Tensor]()
        while True:
            is_done = len(generated) == max_tokens or bool(ended_B.all())
            if self._all_are_done(is_done):
                return torch.stack(generated, dim=1)
            next_B = self._next(tokens, context)
            if is_done:
                continue
            advance_cache(context, tokens.shape[1])
            generated.append(next_B)
            ended_B |= torch.isin(next_B, end_ids)
            tokens = next_B.unsqueeze(1)

    def _all_are_done(self, is_done: bool) -> bool:
        """Whether no rank needs this one's experts any more."""
        if not self._shares_experts:
            return is_done
        all_done = torch.tensor(is_done, dtype=torch.int32, device=self._device)
        dist.all_reduce(all_done, dist.ReduceOp.MIN, group=self._topology.data_group)
        return bool(all_done)

    def _next(self, tokens_BT: Tensor, context: StaticInferenceContext) -> Tensor:
        """int64 [B], the most likely token behind each row; the first one of equally likely tokens."""

        def forward_step(iterator: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            output = model(tokens_BT, None, None, inference_context=context, runtime_gather_output=True)
            return output, self._most_likely

        config = self._model.config
        batch, length = tokens_BT.shape
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([None]),
            model=self._model,
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=batch,
            forward_only=True,
            **without_shape_messages(config, [(length, batch, config.hidden_size)]),
        )
        next_B = reports[0] if reports else torch.empty(batch, dtype=torch.int64, device=tokens_BT.device)
        if self._topology.pipeline_group.size() > 1:
            dist.broadcast(next_B, self._topology.last_stage_rank, group=self._topology.pipeline_group)
        return next_B

    def _most_likely(self, logits_B1V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A loss and a count for the schedule, which wants them, and the tokens as its report.

        The vocabulary's padding is left out.
        """
        nothing = torch.zeros((), device=logits_B1V.device)
        count = torch.ones((), dtype=torch.int, device=logits_B1V.device)
        return nothing, count, logits_B1V[:, -1, : self._vocab_size].argmax(dim=-1)


def _keep_all(keep: Keep, gathered: Sequence[Sequence[Answered]]) -> None:
    for request, answers, seconds in share_time(gathered):
        keep(request, answers, seconds)


def share_time(gathered: Sequence[Sequence[Answered]]) -> list[Answered]:
    """The answers of ranks that worked side by side. Each answer gets its share of the slowest rank's seconds."""
    slowest = max(sum(seconds for _, _, seconds in answered) for answered in gathered)
    everything = [each for answered in gathered for each in answered]
    return [(request, answers, slowest / len(everything)) for request, answers, _ in everything]


def _rounded(length: int) -> int:
    """A little more than `length`: Megatron keeps a table of rotary angles for each length, so there must be few."""
    step = max(_LEAST_STEP, (1 << length.bit_length()) >> 3)
    return -(-length // step) * step

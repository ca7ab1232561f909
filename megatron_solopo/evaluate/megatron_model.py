"""Generation by our own model under tensor, pipeline and data parallelism, with Megatron-Core's static key-value cache.

A batch of equally long prompts goes through in one piece, then one token at a time; each goes through Megatron's
forward-only schedule, which takes it over the pipeline's stages. Only the last position is projected to the vocabulary.
Rows that have ended run along until all have. Memory: the weights, the cache (2 x layers / PP x groups / TP x
head_dim x B x (prompt + room) numbers) and one prompt's activations, since a prompt is not cut into chunks.
Data-parallel ranks take batches in turn and wait for each other after each.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_solopo.architecture.model_directory import huggingface_directory
from megatron_solopo.checkpoint.load import load_weights
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.evaluate.generation import Generated, Keep, MakeSample, built, generate_batch
from megatron_solopo.evaluate.samples import Sample, Spec
from megatron_solopo.evaluate.transformers_model import described_device
from megatron_solopo.generate.transformers import end_tokens
from megatron_solopo.model.build import build_model
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel.megatron_internals import advance_cache
from megatron_solopo.parallel.topology import Topology

_LEAST_STEP = 64


class MegatronModel:
    """A Megatron checkpoint or Hugging Face directory; see `generation.Generator` and `generation.LocalModel`.

    Raises UserError for a layout that does not fit the model, or damaged weights.
    """

    def __init__(
        self, path: Path, tokenizer: Tokenizer, dtype: Any, parallel: ParallelConfig, topology: Topology
    ) -> None:
        model = resolve_model(ModelConfig(path=path, dtype=dtype), parallel)
        (self._model,) = build_model(model, chunk_tokens=1, device=topology.device)
        load_weights([self._model], model.architecture, path)
        self._model.eval()
        self._vocab_size = model.architecture.vocab_size
        self._topology = topology
        self._tokenizer = tokenizer
        self._ends = end_tokens(huggingface_directory(path), tokenizer)
        self.device = described_device(topology.device)
        self.layout = {
            "tensor_model_parallel_size": topology.tensor_group.size(),
            "pipeline_model_parallel_size": topology.pipeline_group.size(),
            "data_parallel_size": topology.data_group.size(),
        }

    def run(self, batches: Sequence[Sequence[Spec]], build: MakeSample, keep: Keep) -> None:
        """All ranks together, with the same batches; global rank 0 keeps."""
        group = self._topology.data_group
        size, rank = group.size(), group.rank()
        for start in range(0, len(batches), size):
            taken = list(batches[start : start + size])
            own = self._generate(built(taken[rank], build)) if rank < len(taken) else []
            found: list[Any] = [None] * size
            dist.all_gather_object(found, own, group=group)
            if dist.get_rank() == 0:
                keep(_sharing_time(found))

    def _generate(self, samples: Sequence[Sample]) -> list[Generated]:
        return generate_batch(self, samples, self._tokenizer, self._ends, self._topology.device)

    @torch.inference_mode()
    def greedy(self, prompts_BT: Tensor, max_new_tokens: int, ends: Collection[int]) -> Tensor:
        """See `generation.LocalModel`. The same on every rank of the model."""
        batch, length = prompts_BT.shape
        context = StaticInferenceContext(batch, _rounded(length + max_new_tokens))
        end_ids = torch.tensor(sorted(ends), dtype=torch.int64, device=prompts_BT.device)
        ended_B = torch.zeros(batch, dtype=torch.bool, device=prompts_BT.device)
        tokens, generated = prompts_BT, list[Tensor]()
        while len(generated) < max_new_tokens and not bool(ended_B.all()):
            next_B = self._next(tokens, context)
            advance_cache(context, tokens.shape[1])
            generated.append(next_B)
            ended_B |= torch.isin(next_B, end_ids)
            tokens = next_B.unsqueeze(1)
        return torch.stack(generated, dim=1)

    def _next(self, tokens_BT: Tensor, context: StaticInferenceContext) -> Tensor:
        """The most likely tokens behind these, int64 [B]; the first of equals."""

        def forward_step(iterator: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            output = model(tokens_BT, None, None, inference_context=context, runtime_gather_output=True)
            return output, self._most_likely

        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([None]),
            model=self._model,
            num_microbatches=1,
            seq_length=tokens_BT.shape[1],
            micro_batch_size=len(tokens_BT),
            forward_only=True,
        )
        next_B = reports[0] if reports else torch.empty(len(tokens_BT), dtype=torch.int64, device=tokens_BT.device)
        if self._topology.pipeline_group.size() > 1:
            dist.broadcast(next_B, self._topology.last_stage_rank, group=self._topology.pipeline_group)
        return next_B

    def _most_likely(self, logits_B1V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the schedule takes for a loss, and the tokens as its report; padding of the vocabulary never wins."""
        nothing = torch.zeros((), device=logits_B1V.device)
        count = torch.ones((), dtype=torch.int, device=logits_B1V.device)
        return nothing, count, logits_B1V[:, -1, : self._vocab_size].argmax(dim=-1)


def _sharing_time(found: Sequence[Sequence[Generated]]) -> list[Generated]:
    """Answers of ranks that worked side by side: each gets its share of the slowest rank's time."""
    slowest = max(sum(each.seconds for each in answers) for answers in found)
    together = [each for answers in found for each in answers]
    return [each.model_copy(update={"seconds": slowest / len(together)}) for each in together]


def _rounded(length: int) -> int:
    """A little more, so that few lengths occur: Megatron keeps a table of rotary angles for each."""
    step = max(_LEAST_STEP, 1 << (length.bit_length() - 3))
    return -(-length // step) * step

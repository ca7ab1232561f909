"""The exchange of tokens among experts in models without memory, whose routers cannot choose.

Versions: 0.16 and 0.19.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


def balance_experts(chunk: torch.nn.Module) -> None:
    """Let the layers of a chunk without memory send every rank as many tokens for its experts."""
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            module.token_dispatcher.__class__ = _BalancedDispatcher
            module.experts.__class__ = _OneForAll


class _BalancedDispatcher(MoEAlltoAllTokenDispatcher):  # type: ignore[misc]
    """Megatron's exchange, without reading numbers of tokens from the device.

    Upstream: `MoEAlltoAllTokenDispatcher` in `megatron/core/transformer/moe/token_dispatcher.py`.
    """

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Copy each token for its experts. Returns the copies and their probabilities."""
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        tokens = hidden_states.view(-1, self.hidden_shape[-1])
        self.hidden_shape_before_permute = tokens.shape
        self.num_out_tokens = len(tokens) * self.config.moe_router_topk
        self._share_out()
        self.reversed_local_input_permutation_mapping = torch.empty(self.num_out_tokens, dtype=torch.int64)
        mask = routing_map.T.contiguous()
        chosen: Tensor = _MaskedSelectShapes.apply(probs.T.contiguous(), mask, self.num_out_tokens)  # type: ignore[no-untyped-call]
        return tokens.index_select(0, self.reversed_local_input_permutation_mapping), chosen

    def _share_out(self) -> None:
        """Make the counts that Megatron gathers, on the host. All ranks send as many tokens."""
        least, more = divmod(self.num_out_tokens, self.num_experts)
        counts = torch.full((self.num_experts,), least, device="cpu")
        counts[:more] += 1
        first, last = self.local_expert_indices[0], self.local_expert_indices[-1] + 1
        self.input_splits = counts.view(self.ep_size, -1).sum(1).tolist()
        mine = counts[first:last]
        self.output_splits = [int(mine.sum())] * self.ep_size
        self.output_splits_tp = torch.full((self.tp_size,), int(mine.sum()) * self.ep_size, device="cpu")
        self.num_global_tokens_per_local_expert = mine.repeat(self.tp_size * self.ep_size, 1)
        self.tokens_per_expert = mine * self.tp_size * self.ep_size


class _OneForAll(SequentialMLP):  # type: ignore[misc]
    """The experts of a rank, whose first one takes all tokens. Together they would keep as many bytes, but take longer.

    Upstream: `SequentialMLP` in `megatron/core/transformer/moe/experts.py`.
    """

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probabilities: Tensor) -> tuple[Tensor, None]:
        """Compute all tokens."""
        output, _ = self.local_experts[0](tokens, probabilities)
        return torch.cat([output]), None


class _MaskedSelectShapes(torch.autograd.Function):
    """Takes, returns and saves the tensors of `masked_select`, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(values, mask)
        return values.new_empty(count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None, None

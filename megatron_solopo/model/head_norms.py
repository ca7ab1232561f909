"""Attention of OLMoE, whose queries are normed over all heads at once, and so are its keys."""

from typing import Any

import torch
import torch.distributed.nn.functional
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm over the heads of all tensor-parallel ranks, of which each holds its own and their weights.

    Source: `OlmoeRMSNorm` in `transformers/models/olmoe/modeling_olmoe.py`.
    """

    def __init__(
        self, config: TransformerConfig, heads: int, head_dim: int, group: torch.distributed.ProcessGroup
    ) -> None:
        super().__init__()
        self.eps, self.group = config.layernorm_epsilon, group
        self.weight = torch.nn.Parameter(torch.ones(heads * head_dim, dtype=config.params_dtype))
        # Its gradient is whole on each rank. The marks let the norm of all gradients count every rank's share.
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads_THD: Tensor) -> Tensor:
        """[..., heads / TP, d] -> the same shape and type."""
        wide = heads_THD.float()
        squares = wide.square().sum((-2, -1), keepdim=True)
        count = heads_THD.shape[-2] * heads_THD.shape[-1] * self.group.size()
        if self.group.size() > 1:
            # Every rank's output depends on the sum, so its gradient is a sum over ranks, too.
            squares = torch.distributed.nn.functional.all_reduce(squares, group=self.group)  # type: ignore[no-untyped-call]
        normed = (wide * torch.rsqrt(squares / count + self.eps)).to(heads_THD.dtype)
        return normed * self.weight.view(heads_THD.shape[-2:])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight, cut along its only dimension."""
        assert metadata is not None
        return dict(
            make_sharded_tensors_for_checkpoint(
                self.state_dict(prefix="", keep_vars=True),
                prefix,
                {"weight": 0},
                sharded_offsets,
                tp_group=self.group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        )


class AllHeadsNormAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention that norms queries and keys over all heads.

    The norms are not `q_layernorm` and `k_layernorm`: Megatron-Core takes those for one head's, and sums the gradients
    of all parameters with such a name over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, **settings: Any) -> None:
        super().__init__(config, *arguments, **settings)
        group, width = self.pg_collection.tp, self.hidden_size_per_attention_head
        self.query_norm = AllHeadsRMSNorm(config, self.num_attention_heads_per_partition, width, group)
        self.key_norm = AllHeadsRMSNorm(config, self.num_query_groups_per_partition, width, group)

    def get_query_key_value_tensors(self, *arguments: Any, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., heads / TP, d], keys and values [..., groups / TP, d]."""
        query, key, value = super().get_query_key_value_tensors(*arguments, **settings)
        return self.query_norm(query), self.key_norm(key), value

"""A model's sizes: all that a plan needs to know of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A dense decoder-only transformer: RMSNorm, SwiGLU, rotary embedding, grouped-query attention."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_sequence_length: int
    """Positions that the model was made for, rope scaling included."""
    add_qkv_bias: bool
    qk_layernorm: bool
    tied_embeddings: bool

    @property
    def num_parameters(self) -> int:
        """Of the whole model, tied embeddings counted once."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        attention = 2 * self.hidden_size * (queries + keys) + (queries + 2 * keys if self.add_qkv_bias else 0)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_layernorm else 0)
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + norms
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

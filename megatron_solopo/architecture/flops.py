"""Floating-point operations of a model, by true lengths."""

from dataclasses import dataclass

from megatron_solopo.architecture.huggingface_config import ModelShape


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of some sequences, by what computes them."""

    linear: float
    """Matrix products of the layers: 2 per weight and token."""
    attention: float
    """Causal attention: 2 x heads x head_dim x L^2 per sequence and layer, half of the full square for scores and
    values."""
    head: float
    """The output layer, on response tokens alone."""

    @property
    def total(self) -> float:
        """The sum."""
        return self.linear + self.attention + self.head


def layer_weights(architecture: ModelShape) -> int:
    """Weights of the matrices of one layer."""
    a = architecture
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    return a.hidden_size * (2 * queries + 2 * keys) + 3 * a.hidden_size * a.ffn_hidden_size


def forward_flops(architecture: ModelShape, tokens: float, squares: float, responses: float) -> Flops:
    """FLOPs of one forward pass; backward is twice that.

    Args:
        tokens: of all sequences together.
        squares: sum over the sequences of their length squared.
        responses: response tokens of all sequences.
    """
    a = architecture
    return Flops(
        linear=2.0 * a.num_layers * layer_weights(a) * tokens,
        attention=2.0 * a.num_layers * a.num_attention_heads * a.head_dim * squares,
        head=2.0 * a.hidden_size * a.vocab_size * responses,
    )

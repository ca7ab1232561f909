"""Counts a model's floating-point operations from the true lengths of sequences."""

from dataclasses import dataclass
from typing import Any

from megatron_solopo.architecture.huggingface_config import ModelShape


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of some sequences."""

    linear: float
    """Matrix products of the layers: 2 per weight and token."""
    attention: float
    """Causal attention: 2 x heads x head_dim x L^2 per sequence and layer, half a square each for scores and values.
    What several responses share of L^2 counts once."""
    head: float
    """The output layer, which sees only response tokens."""

    @property
    def total(self) -> float:
        """The sum of the three."""
        return self.linear + self.attention + self.head

    def of_training(self, *, base_learns: bool = True) -> float:
        """FLOPs of forward and backward. Backward computes the gradients of inputs, and those of weights that learn.

        Args:
            base_learns: False where adapters alone do. Their own FLOPs are not counted: below a hundredth, as a rule.
        """
        of_weights = 3.0 if base_learns else 2.0
        return of_weights * (self.linear + self.head) + 3.0 * self.attention


def linear_weights(architecture: ModelShape) -> int:
    """Number of weights in the layers' matrices that multiply each token: of the experts, the router's choice."""
    a, experts = architecture, architecture.experts
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    attention = a.num_layers * a.hidden_size * (2 * queries + 2 * keys)
    if experts is None:
        return attention + a.num_layers * 3 * a.hidden_size * a.ffn_hidden_size
    columns = experts.topk * experts.ffn_hidden_size + experts.shared_ffn_hidden_size
    gates = experts.num_experts + (1 if experts.shared_ffn_hidden_size else 0)
    sparse = experts.num_layers * a.hidden_size * (3 * columns + gates)
    return attention + sparse + (a.num_layers - experts.num_layers) * 3 * a.hidden_size * a.ffn_hidden_size


def routed_weights(architecture: ModelShape) -> int:
    """Those of `linear_weights` that belong to the experts of the router's choice."""
    a, experts = architecture, architecture.experts
    return 0 if experts is None else experts.num_layers * experts.topk * 3 * a.hidden_size * experts.ffn_hidden_size


def attended_squares(prompts: Any, sequences: Any) -> Any:
    """Twice the pairs of a query and a key that it sees, behind one prompt: the `squares` of `forward_flops`.

    The prompt sees itself. Each response sees the prompt and itself. One response alone gives its sequence squared.

    Args:
        prompts: tokens of the prompt, a number or an array [...].
        sequences: tokens of the prompt and each response together, an array [responses, ...].
    """
    return (sequences**2).sum(axis=0) - (len(sequences) - 1) * prompts**2


def forward_flops(architecture: ModelShape, tokens: float, squares: float, responses: float) -> Flops:
    """Return the FLOPs of one forward pass.

    Args:
        tokens: number of tokens of all sequences.
        squares: sum of the squared lengths of the sequences; for responses that share a prompt, see
            `attended_squares`.
        responses: number of response tokens of all sequences.
    """
    a = architecture
    return Flops(
        linear=2.0 * linear_weights(a) * tokens,
        attention=2.0 * a.num_layers * a.num_attention_heads * a.head_dim * squares,
        head=2.0 * a.hidden_size * a.vocab_size * responses,
    )

"""The experts of a mixture-of-experts model: how many there are, how wide they are, and how a router chooses them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertShape:
    """What the layers with experts have in common. A router sends each token to its `topk` best experts."""

    num_experts: int
    """Experts of each layer that has any."""
    topk: int
    """Experts that compute a token."""
    ffn_hidden_size: int
    """Feed-forward columns of each expert."""
    renormalizes: bool
    """Whether the probabilities of a token's experts are divided by their sum (`norm_topk_prob`)."""
    layers: tuple[bool, ...]
    """For each layer of the model, whether it has experts. The other layers have one dense feed-forward."""
    shared_ffn_hidden_size: int = 0
    """Feed-forward columns of the expert that computes every token, behind a gate of its own. 0: there is none."""

    @property
    def in_all_layers(self) -> bool:
        """Whether there is no dense layer."""
        return all(self.layers)

    @property
    def num_layers(self) -> int:
        """Layers that have experts."""
        return sum(self.layers)

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
    load_max_over_mean: float = 1.0
    """Tokens of a layer's fullest expert over the mean of its experts. No config.json states it: a plan assumes it."""

    @property
    def in_all_layers(self) -> bool:
        """Whether there is no dense layer."""
        return all(self.layers)

    def rank_load(self, expert_model_parallel_size: int) -> float:
        """Tokens of the fullest rank over the mean of the ranks that share the experts, at most.

        A rank has at most as many times the mean as its fullest expert, and at most all tokens.
        """
        return min(self.load_max_over_mean, expert_model_parallel_size)

    @property
    def num_layers(self) -> int:
        """Layers that have experts."""
        return sum(self.layers)

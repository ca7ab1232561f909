"""Random triplets of exact lengths. Imports neither megatron nor a trainer, so that any process may use it."""

import numpy as np

from megatron_solopo.data.packing import TokenizedTriplet


def random_triplet(short: int, long: int, response: int, vocab_size: int, index: int) -> TokenizedTriplet:
    """A triplet whose sequences, prompt and response together, have exactly these lengths in tokens."""
    generator = np.random.default_rng(index)
    lengths = {"short": short - response, "long": long - response}
    prompts = {name: generator.integers(vocab_size, size=length) for name, length in lengths.items()}
    responses = {name: generator.integers(vocab_size, size=response) for name in ("chosen", "rejected")}
    return TokenizedTriplet(f"random-{index}", index, prompts, responses)

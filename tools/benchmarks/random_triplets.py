"""Random triplets of exact lengths. Imports neither megatron nor a trainer, so that any process may use it."""

import numpy as np

from megatron_solopo.data.packing import TokenizedTriplet


def random_triplet(short: int, long: int, response: int, vocab_size: int, index: int) -> TokenizedTriplet:
    """A triplet whose sequences, prompt and response together, have exactly these lengths in tokens."""
    generator = np.random.default_rng(index)
    prompts = {"short": short - response, "long": long - response}
    responses = {"chosen": response, "rejected": response}
    columns = [{k: generator.integers(vocab_size, size=n) for k, n in each.items()} for each in (prompts, responses)]
    return TokenizedTriplet(f"random-{index}", index, *columns)

"""Random streams that depend on a seed and a name alone."""

import hashlib

import numpy as np

_SEED_BITS = 31


def generator(seed: int, name: str) -> np.random.Generator:
    """A random stream for one purpose, so that its draws depend on no other sample."""
    return np.random.default_rng(int.from_bytes(_digest(seed, name), "big"))


def derived_seed(seed: int, name: str) -> int:
    """A seed below 2**31 for one purpose, which every server and library takes."""
    return int.from_bytes(_digest(seed, name), "big") % (1 << _SEED_BITS)


def _digest(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()

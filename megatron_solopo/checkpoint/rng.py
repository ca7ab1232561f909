"""The state of every random number generator of a rank, as bytes that are read without running code.

Nothing in a run draws from them today: dropout is 0, and the order of the data follows from seed and position. They are
kept so that this stays true of whatever will draw. They belong to a rank: under another layout there is no exact
counterpart, and generators start from the seed there.
"""

import random

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors.torch import load, save
from torch import Tensor

_TRACKER = "megatron."


def rng_state() -> bytes:
    """Of Python, numpy, torch on the CPU and on this rank's GPU, and Megatron's tracker."""
    version, words, gauss = random.getstate()
    assert version == 3
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert name == "MT19937"
    state: dict[str, Tensor] = {
        "python": torch.tensor(words),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy.place": torch.tensor([position, has_gauss]),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    state |= {_TRACKER + each: tensor for each, tensor in get_cuda_rng_tracker().get_states().items()}
    return save({key: tensor.cpu().contiguous().clone() for key, tensor in state.items()})


def restore_rng(content: bytes) -> None:
    """Let every generator go on where `rng_state` found it."""
    state = load(content)
    gauss = state["python.gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy.place"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy.gauss"])))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    tracked = {key.removeprefix(_TRACKER): tensor for key, tensor in state.items() if key.startswith(_TRACKER)}
    get_cuda_rng_tracker().set_states(tracked)

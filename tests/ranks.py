"""One-rank and two-rank worlds for unit tests."""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_solopo.config import ParallelConfig
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.topology import Topology
from tests.distributed import run_distributed


@contextmanager
def layout(**sizes: Any) -> Iterator[Topology]:
    """Process groups of `parallel.*` sizes over the ranks at hand (one, outside `on_two_ranks`)."""
    groups = topology.initialize(ParallelConfig(**sizes), seed=1)
    try:
        yield groups
    finally:
        topology.destroy(groups)


@functools.cache
def two_ranks(module: str) -> list[Any]:
    """What `on_two_ranks` of a test module returns, in rank order. The first call launches the ranks."""
    return run_distributed(_on_two_ranks, 2, module)


def _on_two_ranks(module: str) -> Any:
    return importlib.import_module(module).on_two_ranks()

"""One-rank and two-rank worlds for unit tests; the two ranks are launched once for all test files."""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_solopo.config import ParallelConfig
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.topology import Topology
from tests.distributed import run_distributed

# Each has a function `on_two_ranks`, run on both ranks; its results are asserted in that file's tests.
_MODULES = (
    "tests.parallel.test_agreement",
    "tests.parallel.test_context",
    "tests.parallel.test_topology",
    "tests.checkpoint.test_load",
    "tests.checkpoint.test_sharded_state",
    "tests.model.test_label_logprobs",
    "tests.model.test_microbatch",
    "tests.model.test_layers",
    "tests.model.test_adapters",
    "tests.model.test_head",
    "tests.evaluate.test_long_context",
    "tests.evaluate.test_megatron_model",
    "tests.train.test_step",
    "tests.train.test_model_fingerprint",
    "tests.train.test_signal_stages",
    "tests.tools.test_pipeline_messages",
)


@contextmanager
def layout(**sizes: Any) -> Iterator[Topology]:
    """Process groups of `parallel.*` sizes over the ranks at hand (one, outside `on_two_ranks`)."""
    groups = topology.initialize(ParallelConfig(**sizes), seed=1)
    try:
        yield groups
    finally:
        topology.destroy(groups)


def two_ranks(module: str) -> list[Any]:
    """What `on_two_ranks` of `module` returned, in rank order."""
    return [found[module] for found in _launch()]


@functools.cache
def _launch() -> list[dict[str, Any]]:
    return run_distributed(_run_modules, 2)


def _run_modules() -> dict[str, Any]:
    return {name: importlib.import_module(name).on_two_ranks() for name in _MODULES}

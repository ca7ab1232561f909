"""How long all ranks plan a save together, and what they exchange and write for it, without their memory.

    MEGATRON_SOLOPO_DEVICE=cpu python -m tools.benchmarks.save_planning --ranks 64 \\
        --config examples/plans/llama-3.1-70b.yaml parallel.tensor_model_parallel_size=4

This process takes the place of every rank in turn and plans its part with Megatron's real code, on tensors without
memory. Rank 0 comes last: it gets the plans of all ranks, checks them, and makes the list of pieces. The network's time
is not part of it.
"""
# ruff: noqa: E402  (megatron's warnings of what is not installed must be off before it is imported)

import pickle
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import click

warnings.filterwarnings("ignore")

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper
from tqdm import tqdm

from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.checkpoint.save import new_plans
from megatron_solopo.checkpoint.sharded_state import SHARDING, state_to_save
from megatron_solopo.config import Config, load_config
from megatron_solopo.model.build import build_model
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.megatron_internals import (
    SavePlans,
    ShardedFiles,
    initialize_adam_state,
    megatron_on_meta,
    optimizer_parts,
    simulated_rank,
)
from megatron_solopo.plan.layouts import replace_settings, without_gpu
from megatron_solopo.train.policy import build_optimizer, wrap_data_parallel
from tools.reporting import environment, table


@click.command(help=__doc__)
@click.argument("overrides", nargs=-1)
@click.option("--config", "path", type=click.Path(path_type=Path), required=True)
@click.option("--ranks", type=click.IntRange(min=1), default=64, show_default=True)
def main(path: Path, ranks: int, overrides: tuple[str, ...]) -> None:
    # On GPUs gradients are reduced early, in buckets that all ranks divide among them.
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": False}
    config = replace_settings(without_gpu(load_config(path, overrides)), parallel=overlap)
    architecture = read_architecture(config.model.path)
    sent: list[bytes] = []
    own: list[float] = []
    with TemporaryDirectory() as folder:
        for rank in tqdm(range(ranks - 1, 0, -1)):
            with _state(config, architecture, rank, ranks) as state, _gathered(sent.append, []):
                own.append(_plan(state, Path(folder) / "others", new_plans())[0])
        with _state(config, architecture, 0, ranks) as state:
            rows = _plan_on_rank_0(state, Path(folder), sent[::-1])
    click.echo(environment())
    click.echo(f"slowest of the other ranks: {max(own):.2f} s; the largest plan sent: {max(map(len, sent)):,} bytes")
    click.echo(table(list(rows[0]), [list(row.values()) for row in rows]))


def _plan_on_rank_0(state: Any, folder: Path, sent: list[bytes]) -> list[dict[str, str]]:
    rows, plans = [], new_plans()
    for save in range(2):
        with _gathered(lambda _: None, sent):
            seconds, files = _plan(state, folder / str(save), plans)
        chunks = [len(getattr(each, "chunks", ())) for each in files._metadata.state_dict_metadata.values()]
        written = [_written(number, plan) for number, plan in enumerate(map(pickle.loads, sent), 1)]
        own: Any = plans.cached_local_plan
        files.finish([_written(0, own), *written])
        started = time.monotonic()
        FileSystemReader(folder / str(save)).read_metadata()
        reading = time.monotonic() - started
        rows.append(
            {
                "save": str(save + 1),
                "rank 0 plans s": f"{seconds:.2f}",
                "pieces": f"{sum(chunks):,}",
                "of one key": f"{max(chunks):,}",
                "bytes of .metadata": f"{(folder / str(save) / '.metadata').stat().st_size:,}",
                "a rank reads it in s": f"{reading:.2f}",
            }
        )
    return rows


def _written(rank: int, plan: SavePlan) -> list[WriteResult]:
    """What a rank would tell of the files that it has written."""
    place = _StorageInfo(f"__{rank}_0.distcp", 1 << 34, 1 << 30)
    return [WriteResult(item.index, place.length, replace(place)) for item in plan.items]


def _plan(state: Any, folder: Path, plans: SavePlans) -> tuple[float, ShardedFiles]:
    folder.mkdir(exist_ok=True)
    started = time.monotonic()
    files = ShardedFiles(dict(state), folder, dict(SHARDING), plans)
    return time.monotonic() - started, files


@contextmanager
def _state(config: Config, architecture: Architecture, rank: int, ranks: int) -> Iterator[Any]:
    """What `rank` saves, on tensors without memory."""
    with ExitStack() as stack:
        stack.enter_context(simulated_rank(rank, ranks))
        groups = topology.initialize(config.parallel, 1)
        stack.callback(topology.destroy, groups)
        stack.enter_context(megatron_on_meta())
        model = resolve_model(config.model, config.parallel, architecture=architecture)
        chunks = build_model(model, chunk_tokens=config.logprob.chunk_tokens, device=torch.device("meta"))
        wrapped = wrap_data_parallel(chunks, config.optimizer, config.parallel)
        optimizer = build_optimizer(wrapped, config.optimizer)
        initialize_adam_state(optimizer)
        for part in optimizer_parts(optimizer):
            for moments in part.optimizer.state.values():
                moments["step"] = torch.tensor(1.0, device="cpu")  # it is read
        yield state_to_save(wrapped, optimizer)


@contextmanager
def _gathered(send: Any, sent: list[bytes]) -> Iterator[None]:
    """Let the ranks gather their plans on rank 0, which unpacks what the others have sent."""

    def gather_object(wrapper: _DistWrapper, plan: Any) -> Any:
        packed = pickle.dumps(plan)
        send(packed)
        return [plan, *map(pickle.loads, sent)] if dist.get_rank() == 0 else None

    with mock.patch.object(_DistWrapper, "gather_object", gather_object):
        yield


if __name__ == "__main__":
    main()

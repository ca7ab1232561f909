"""Runs the start of a run on one rank of a large world, and counts what it costs.

A fake process group of the full size gives this process the place of one rank. The real code of a start runs: checks,
process groups, roll call, agreements, identity, and optionally the load of the weights. Collectives move nothing. Every
other rank is taken to have what this rank has. What rank 0 does for all is done here too, but not counted.
"""

import ctypes
import os
import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_solopo.architecture.layout import check_world_size
from megatron_solopo.checkpoint.huggingface_weights import SafetensorsDirectory
from megatron_solopo.config import Config, ParallelConfig
from megatron_solopo.errors import UserError
from megatron_solopo.parallel import agreement
from megatron_solopo.parallel.megatron_internals import simulated_rank
from megatron_solopo.plan.layouts import without_gpu
from megatron_solopo.plan.startup import WORLDS, StartupCounts
from megatron_solopo.train.preflight import check_surroundings
from megatron_solopo.train.session import open_session
from megatron_solopo.train.trainer import Trainer

_GPUS_PER_HOST = 8
_FEW_NUMBERS = 1024
_IN_OPEN, _IN_ISDIR = 0x20, 0x40000000


def count_startups(config: Config) -> list[StartupCounts]:
    """Count the start in each of `WORLDS` that the layout of `config` divides, without the load of the weights.

    Raises UserError as a real start does, for example where `model.path` holds no weights.
    """
    with TemporaryDirectory() as folder:
        trial = without_gpu(config).model_copy(update={"run_dir": Path(folder)})
        worlds = [ranks for ranks in WORLDS if _has_a_layout(config.parallel, ranks)]
        # The first start also imports libraries, and is not counted.
        return [count_startup(trial, ranks, builds_model=False) for ranks in (*worlds[:1], *worlds)][1:]


def _has_a_layout(parallel: ParallelConfig, ranks: int) -> bool:
    try:
        check_world_size(parallel, ranks)
    except UserError:
        return False
    return True


def count_startup(config: Config, ranks: int, *, builds_model: bool) -> StartupCounts:
    """Start the last one of `ranks` ranks, up to its first step.

    Args:
        config: `run_dir` is written to.
        builds_model: also load this rank's share of the weights and make the optimizer, in this process's memory.

    Raises UserError as a real start does.
    """
    rank = ranks - 1
    store = HashStore()
    counter = _Counter(_folders(config))
    places = {"LOCAL_RANK": str(rank % _GPUS_PER_HOST), "LOCAL_WORLD_SIZE": str(min(ranks, _GPUS_PER_HOST))}
    with ExitStack() as stack:
        stack.callback(counter.close)
        stack.enter_context(mock.patch.dict(os.environ, places))
        stack.enter_context(simulated_rank(rank, ranks, store))
        stack.enter_context(counter.counting())
        session = stack.enter_context(open_session(config))
        check_surroundings(config, session.model.architecture, session.topology, session.max_steps, lambda _: None)
        if builds_model:
            Trainer(session).prepare()
        counter.stop()
        posted = store.num_keys()
    return StartupCounts(
        ranks=ranks,
        files_opened=counter.files_opened,
        bytes_read=counter.bytes_read,
        weight_bytes=counter.weight_bytes,
        exchanges=counter.exchanges,
        exchanged_bytes=counter.exchanged_bytes,
        store_keys=posted + len(counter.gloo_groups),
        gloo_groups=tuple(counter.gloo_groups),
    )


def _folders(config: Config) -> list[Path]:
    folders = {config.model.path, *(source.config.data.directory for source in config.sources)}
    if config.needs_reference:
        folders |= {config.reference.model_path or config.model.path, config.reference_cache}
    return [folder for folder in folders if folder.is_dir()]


class _Counter:
    """Counts what one rank does within `counting`."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.files_opened = self.weight_bytes = self.exchanges = self.exchanged_bytes = 0
        self.gloo_groups: list[int] = []
        self._watch = _OpenWatch(folders)
        self._not_ours = -_bytes_read()
        self.bytes_read = 0

    def stop(self) -> None:
        """Count files no longer."""
        self.files_opened += self._watch.opened()
        self.bytes_read = _bytes_read() + self._not_ours

    def close(self) -> None:
        self._watch.close()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Replace what the ranks share, for as long as the block lasts."""
        replaced: list[tuple[Any, str, Any]] = [
            (dist, "new_group", self._new_group(dist.new_group)),
            (dist, "all_gather_object", self._all_gather_object),
            (dist, "broadcast_object_list", self._broadcast_object_list),
            (dist, "all_reduce", self._all_reduce(dist.all_reduce)),
            (agreement, "_attempt_on_rank_0", self._attempt_on_rank_0),
            (psutil, "disk_usage", lambda path: mock.Mock(free=1 << 60)),
            (SafetensorsDirectory, "read", self._read(SafetensorsDirectory.read)),
        ]
        with ExitStack() as stack:
            for target, name, replacement in replaced:
                stack.enter_context(mock.patch.object(target, name, replacement))
            yield

    def _exchange(self, count: int) -> None:
        self.exchanges += 1
        self.exchanged_bytes += count

    def _new_group(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def new_group(ranks: Sequence[int] | None = None, *arguments: Any, **keywords: Any) -> Any:
            members = list(range(dist.get_world_size())) if ranks is None else list(ranks)
            if keywords.get("backend") == "gloo" and dist.get_rank() in members and len(members) > 1:
                self.gloo_groups.append(len(members))
            return original(ranks, *arguments, **keywords)

        return new_group

    def _all_gather_object(self, found: list[Any], own: Any, group: Any = None) -> None:
        found[:] = [own] * len(found)
        self._exchange(len(found) * (len(pickle.dumps(own)) + 8))

    def _broadcast_object_list(self, values: list[Any], src: int = 0, group: Any = None) -> None:
        self._exchange(sum(len(pickle.dumps(value)) + 8 for value in values))

    def _all_reduce(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def all_reduce(
            tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
        ) -> Any:
            if tensor.numel() < _FEW_NUMBERS:
                self._exchange(tensor.nbytes)
            work = original(tensor, op, group, async_op)
            if op == dist.ReduceOp.SUM:
                tensor.mul_(dist.get_world_size(group))
            return work

        return all_reduce

    def _attempt_on_rank_0(self, action: Callable[[], Any]) -> tuple[Any, Exception | None]:
        """Do what rank 0 does, without counting the files that it opens."""
        self.files_opened += self._watch.opened()
        before = _bytes_read()
        result = agreement._attempt(action)
        self._watch.opened()
        self._not_ours -= _bytes_read() - before
        return result

    def _read(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def read(directory: SafetensorsDirectory, *arguments: Any) -> torch.Tensor:
            part = original(directory, *arguments)
            self.weight_bytes += part.nbytes
            return part

        return read


def _bytes_read() -> int:
    """What this process has read with system calls so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


class _OpenWatch:
    """Counts how often files in some folders are opened, whichever library opens them (Linux's inotify)."""

    def __init__(self, folders: Sequence[Path]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._events = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._events >= 0, os.strerror(ctypes.get_errno())
        for top in folders:
            for folder, _, _ in os.walk(top):
                watch = libc.inotify_add_watch(self._events, os.fsencode(folder), _IN_OPEN)
                assert watch >= 0, os.strerror(ctypes.get_errno())

    def opened(self) -> int:
        """Opened files since the last call."""
        count = 0
        while True:
            try:
                events = os.read(self._events, 1 << 20)
            except BlockingIOError:
                return count
            start = 0
            while start < len(events):
                _, mask, _, length = struct.unpack_from("iIII", events, start)
                start += struct.calcsize("iIII") + length
                count += not mask & _IN_ISDIR

    def close(self) -> None:
        os.close(self._events)

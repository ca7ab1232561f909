"""Every metric of every training step, negative ones too: Megatron-LM's console line leaves those out.

`metrics.jsonl` has the names and the form of our own trainer's, without what Megatron-LM alone knows:
gradient norm, learning rate, times and evaluation are in its own log, TensorBoard and W&B.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_solopo.data.loader import GlobalBatch
from megatron_solopo.integrations.stream import StepPack
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.metrics import keep_before


class StepLog:
    """Sums the reports of a step's packs, and writes their means when the last one has come.

    It lives on the last pipeline stage, where losses are. The ranks of a data-parallel group meet in one
    all-reduce per step; the very first of them writes.
    """

    def __init__(self, run_dir: Path, names: Sequence[str], topology: Topology, first_step: int) -> None:
        """Continue at `first_step`: later lines of an interrupted run are dropped, as those steps are run again."""
        self._path, self._names, self._topology = run_dir / "metrics.jsonl", names, topology
        self._step = first_step - 1
        self._batch: GlobalBatch | None = None
        self._reports: list[Tensor] = []
        groups = (topology.data_group, topology.context_group, topology.tensor_group)
        self._writes = topology.is_last_stage and all(group.rank() == 0 for group in groups)
        if self._writes:
            run_dir.mkdir(parents=True, exist_ok=True)
            keep_before(self._path, first_step)

    def add(self, item: StepPack, report: Tensor) -> None:
        """Take the report of one pack, fp32 sums [M]."""
        if item.number == 0:
            self._reports = []
        self._reports.append(report)
        if not item.is_last:
            return
        sums = torch.stack(self._reports).double().sum(dim=0)
        dist.all_reduce(sums, group=self._topology.data_group)
        # Megatron-LM may run a step again to tell a faulty GPU from a faulty program: same batch, same step.
        is_new = item.batch is not self._batch
        self._batch = item.batch
        self._step += is_new
        if self._writes and is_new:
            self._write((sums / item.batch.num_triplets).tolist(), item.batch)

    def _write(self, means: list[float], batch: GlobalBatch) -> None:
        metrics = dict(zip(self._names, means, strict=True))
        counts = {"num_triplets": batch.num_triplets, "num_tokens": batch.num_tokens, "pack_fill": batch.pack_fill}
        # NaN is no JSON: a run that has gone wrong says so with null, and Megatron-LM's own checks stop it.
        line = {name: value if value - value == 0 else None for name, value in (metrics | counts).items()}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": self._step} | line, allow_nan=False) + "\n")
        shown = " | ".join(f"{name} {value:+.4f}" for name, value in metrics.items())
        tqdm.write(f" solopo iteration {self._step} | {shown}")

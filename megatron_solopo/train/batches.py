"""Global batches of a run: the data room's loaders, for this rank's place and this run's budget."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch.distributed as dist
from tqdm import tqdm

from megatron_solopo.architecture.fp8 import pack_multiple
from megatron_solopo.config import Config
from megatron_solopo.data.dataset import TripletDataset
from megatron_solopo.data.loader import GlobalBatch, GlobalBatchLoader, Packing, sequential_batches
from megatron_solopo.objective import required_roles
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.progress import bar_style

_SINGLE_PASS_TRIPLETS_PER_RANK = 16


def training_batches(
    config: Config,
    dataset: TripletDataset,
    topology: Topology,
    *,
    global_batch_size: int | None = None,
    packs_multiple: int | None = None,
) -> GlobalBatchLoader:
    """Endless shuffled global batches; raises ValueError where data, batch and budget do not fit.

    Args:
        global_batch_size: triplets per batch; None: the config's.
        packs_multiple: every rank's number of packs is a multiple of this; None: of what the schedule needs.
    """
    packing = _packing(config, topology)
    if packs_multiple is not None:
        packing = replace(packing, packs_multiple=packs_multiple)
    return GlobalBatchLoader(
        dataset,
        required_roles(config.objective),
        packing,
        global_batch_size=global_batch_size or config.training.global_batch_size,
        seed=config.seed,
    )


def single_pass(
    config: Config,
    dataset: TripletDataset,
    topology: Topology,
    label: str,
    roles: Sequence[str] | None = None,
    boundary: Callable[[], None] | None = None,
) -> Iterator[GlobalBatch]:
    """Every triplet once, with a progress bar named `label` on rank 0; some packs may not be `counted`.

    Args:
        roles: the sequences of a triplet that share a pack; None: those that the objective reads.
        boundary: called before every batch, by all ranks together.
    """
    chunk_size = _SINGLE_PASS_TRIPLETS_PER_RANK * topology.data_group.size()
    roles = required_roles(config.objective) if roles is None else roles
    batches = sequential_batches(dataset, roles, _packing(config, topology), chunk_size=chunk_size)
    total = -(-len(dataset) // chunk_size)
    for batch in tqdm(batches, label, total, unit="batch", disable=dist.get_rank() != 0, **bar_style("batches")):
        if boundary is not None:
            boundary()
        yield batch


def _packing(config: Config, topology: Topology) -> Packing:
    return Packing(
        sequence_multiple=topology.sequence_multiple,
        pack_multiple=pack_multiple(config.parallel, config.model),
        max_tokens_per_pack=config.data.max_tokens_per_pack,
        max_triplets_per_pack=config.data.max_triplets_per_pack,
        dp_rank=topology.data_group.rank(),
        dp_size=topology.data_group.size(),
        packs_multiple=topology.packs_multiple,
    )

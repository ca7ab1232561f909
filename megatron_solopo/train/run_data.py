"""The prepared data of a run, checked against its objective and its model, and the batches that this rank reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.config import Config, Role, Source
from megatron_solopo.data.loader import GlobalBatchLoader, LoaderSource, Packing, SinglePass, TripletDataset
from megatron_solopo.data.model_fit import Reader, check_readers
from megatron_solopo.data.objective_fit import check_kind
from megatron_solopo.data.prepared import PreparedData, PreparedManifest, load_prepared
from megatron_solopo.errors import UserError
from megatron_solopo.files import counted
from megatron_solopo.parallel.agreement import on_every_rank, on_rank_0
from megatron_solopo.parallel.topology import Topology


@dataclass(frozen=True)
class RunDatasets:
    """The training split and, if one was held out, the evaluation split."""

    manifest: PreparedManifest
    by_split: dict[str, TripletDataset]
    """`train`, and `eval` if there is one."""
    checked: str
    """The models that the data was checked against, in a line."""
    notes: tuple[str, ...]
    """What could not be checked, one line each."""


@dataclass(frozen=True)
class RunSource:
    """One of the sets of rows that a run reads, opened and checked."""

    source: Source
    datasets: RunDatasets

    @property
    def name(self) -> str:
        """ "" for `data.path`."""
        return self.source.name

    @property
    def config(self) -> Config:
        """The run as if it read only these rows."""
        return self.source.config

    @property
    def train(self) -> TripletDataset:
        """The training split."""
        return self.datasets.by_split["train"]

    @property
    def held_out(self) -> TripletDataset | None:
        """The evaluation split, if there is one."""
        return self.datasets.by_split.get("eval")


def load_run_sources(
    config: Config, architecture: Architecture, prepared: Sequence[PreparedData]
) -> tuple[RunSource, ...]:
    """`load_run_datasets` of every source of a run. All ranks together.

    Args:
        prepared: of each source.

    Raises UserError also if `training.eval_steps` is set and no source has a held-out split.
    """
    sources = tuple(
        RunSource(source, load_run_datasets(source.config, architecture, opened, source.name))
        for source, opened in zip(config.sources, prepared, strict=True)
    )
    if config.training.eval_steps is not None and all(each.eval is None for each in prepared):
        places = ", ".join(str(source.config.data.directory) for source in config.sources)
        raise UserError(
            f"training.eval_steps={config.training.eval_steps}, but {places} has no held-out split; "
            "prepare it with --eval-count, or remove the key"
        )
    return sources


def load_run_datasets(
    config: Config, architecture: Architecture, prepared: PreparedData | None = None, source: str = ""
) -> RunDatasets:
    """Open `data.path`, and check it against the config and against every model that reads it. All ranks together.

    Each rank maps the rows that it will read. Rank 0 alone loads tokenizers, and reads all tokens where an older
    version of the data does not state what they are.

    Args:
        architecture: of `model.path`. That of `reference.model_path` is read here.
        prepared: `data.path`, where the caller has opened it already.
        source: name of these rows in `data.sources`; "": the run reads `data.path` alone.

    Raises UserError on every rank if the data is incomplete, or does not fit the config:

    - its rows lack sequences that the objective needs, see `data.objective_fit`;
    - a model cannot read it, see `data.model_fit`.
    """
    opened = prepared or on_every_rank(lambda: load_prepared(config.data.directory))
    manifest, checked, notes = on_rank_0(lambda: _check(config, architecture, opened, source))
    columns = {"short": opened.prompt_column("short"), "long": opened.prompt_column("long")}
    datasets = {"train": TripletDataset(opened.train, columns, architecture, source)}
    if opened.eval is not None:
        datasets["eval"] = TripletDataset(opened.eval, columns, architecture, source)
    return RunDatasets(manifest, datasets, checked, tuple(notes))


def _check(
    config: Config, architecture: Architecture, prepared: PreparedData, source: str
) -> tuple[PreparedManifest, str, list[str]]:
    """On rank 0: the manifest with the hash of the tokens, what was checked, and what could not be."""
    check_kind(config, prepared.manifest, source)
    manifest = prepared.hashed_manifest()
    path = config.data.directory
    readers = _readers(config, architecture)
    notes = check_readers(readers, prepared, path, config.contexts_read)
    unknown = f" ({counted(len(notes), 'tokenizer')} not known)" if notes else ""
    return (
        manifest,
        f"{counted(len(readers), 'model')}: tokenizer, vocabulary and positions fit the data{unknown}",
        notes,
    )


def _readers(config: Config, architecture: Architecture) -> list[Reader]:
    """The models that read the data: the one of `model.path`, and another reference model if the objective uses it."""
    readers = [Reader(config.model.path, architecture)]
    path = config.reference.model_path
    if config.objective.needs_reference and path is not None and path != config.model.path:
        readers.append(Reader(path, read_architecture(path, "reference.model_path"), is_reference=True))
    return readers


def training_batches(
    config: Config,
    sources: Sequence[LoaderSource],
    topology: Topology,
    *,
    global_batch_size: int | None = None,
    packs_multiple: int | None = None,
) -> GlobalBatchLoader:
    """Endless shuffled global batches; raises UserError if data, batch size and tokens per pack do not fit.

    Args:
        global_batch_size: triplets per batch; None: as the config says.
        packs_multiple: every rank gets a multiple of this number of packs; None: what the schedule needs.
    """
    packing = _packing(config, topology)
    if packs_multiple is not None:
        packing = replace(packing, packs_multiple=packs_multiple, wanted_packs=1)
    return GlobalBatchLoader(
        sources,
        packing,
        global_batch_size=global_batch_size or config.training.global_batch_size,
        seed=config.seed,
    )


def loader_source(source: RunSource) -> LoaderSource:
    """The training split of a source, with the sequences that its objective reads."""
    return LoaderSource(source.train, source.config.objective.roles.all, source.source.weight)


def single_pass(
    config: Config,
    dataset: TripletDataset,
    topology: Topology,
    roles: Sequence[Role] | None = None,
    done: NDArray[np.bool_] | None = None,
) -> SinglePass:
    """This rank's packs of a pass over every triplet; raises UserError if a triplet is larger than a pack.

    Args:
        roles: the sequences of a triplet that share a pack; None: those that the objective reads.
        done: see `SinglePass`.
    """
    # A pipeline wants whole parts. Without one, packs are as large as they may be.
    wanted = topology.packs_per_part if topology.pipeline_group.size() > 1 else 1
    packing = replace(_packing(config, topology), wanted_packs=wanted)
    roles = config.objective.roles.all if roles is None else roles
    return SinglePass(dataset, roles, packing, packs_per_part=topology.packs_per_part, done=done)


def _packing(config: Config, topology: Topology) -> Packing:
    return Packing(
        sequence_multiple=topology.sequence_multiple,
        share_prompts=config.data.share_prompts,
        pack_multiple=topology.pack_multiple(config.model),
        max_tokens_per_pack=config.data.max_tokens_per_pack,
        max_triplets_per_pack=config.data.max_triplets_per_pack,
        dp_rank=topology.data_group.rank(),
        dp_size=topology.data_group.size(),
        packs_multiple=topology.packs_multiple,
        wanted_packs=topology.wanted_packs,
    )

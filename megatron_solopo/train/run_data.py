"""The prepared data of a run, checked against its objective and its model, and the batches that this rank reads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from tqdm import tqdm

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.model_directory import has_tokenizer
from megatron_solopo.config import Config, Role
from megatron_solopo.data.loader import GlobalBatch, GlobalBatchLoader, Packing, TripletDataset, sequential_batches
from megatron_solopo.data.prepared import PreparedData, PreparedManifest, load_prepared
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.progress import bar_style

_SINGLE_PASS_TRIPLETS_PER_RANK = 16


@dataclass(frozen=True)
class RunDatasets:
    """The training split and, if one was held out, the evaluation split."""

    manifest: PreparedManifest
    by_split: dict[str, TripletDataset]
    """`train`, and `eval` if there is one."""


def load_run_datasets(config: Config, architecture: Architecture) -> RunDatasets:
    """Open `data.path`.

    Raises UserError if the data is incomplete, or does not fit the config:

    - it holds pairs, but the objective needs triplets;
    - it was tokenized with another tokenizer than the model's;
    - it holds token ids that the model has no embedding for;
    - it has longer sequences than the model has positions;
    - it has no held-out split, but `training.eval_steps` is set.
    """
    prepared = load_prepared(config.data.path)
    manifest = prepared.manifest
    if manifest.kind == "pair" and config.objective.name == "solopo":
        raise UserError(
            f"{config.data.path}: holds plain pairs (prompt, chosen, rejected), but objective.name=solopo needs "
            "prompt_short and prompt_long; prepare triplets, or set objective.name=short_po"
        )
    _check_tokenizer(config, prepared, architecture)
    columns = {"short": prepared.prompt_column("short"), "long": prepared.prompt_column("long")}
    _check_lengths(config, manifest, architecture, columns)
    datasets = {"train": TripletDataset(prepared.train, columns, architecture)}
    if prepared.eval is not None:
        datasets["eval"] = TripletDataset(prepared.eval, columns, architecture)
    elif config.training.eval_steps is not None:
        raise UserError(
            f"training.eval_steps={config.training.eval_steps}, but {config.data.path} has no held-out split; "
            "prepare it with --eval-count, or remove the key"
        )
    return RunDatasets(manifest, datasets)


def _check_tokenizer(config: Config, prepared: PreparedData, architecture: Architecture) -> None:
    """Compare ids that occur: a tokenizer may have tokens, such as an unused padding token, that no row uses."""
    manifest, largest = prepared.manifest, prepared.largest_token_id()
    own = _model_tokenizer(config)
    if own not in (None, manifest.fingerprint_parts["tokenizer"]):
        raise UserError(
            f"{config.data.path}: tokenized by {manifest.tokenizer}, which is not the tokenizer of the model "
            f"{config.model.path}; prepare the data with the model's own tokenizer"
        )
    if largest >= architecture.vocab_size:
        way_out = (
            "prepare the data with the model's own tokenizer"
            if own is None
            else "extend the embedding with transformers' resize_token_embeddings, or remove that token from the rows"
        )
        raise UserError(
            f"{config.data.path}: holds the token id {largest}, but the model {config.model.path} has embeddings for "
            f"ids up to {architecture.vocab_size - 1}; {way_out}"
        )


def _model_tokenizer(config: Config) -> str | None:
    """The fingerprint of the tokenizer beside the weights, or None if there is no tokenizer."""
    if not has_tokenizer(config.model.path):
        return None
    return load_tokenizer(config.model.path).fingerprint


def _check_lengths(
    config: Config, manifest: PreparedManifest, architecture: Architecture, columns: Mapping[str, str]
) -> None:
    """Check an upper bound: the longest prompt of the contexts in use plus the longest response."""
    contexts = {role.context for role in config.objective.roles.all}
    longest = max(manifest.lengths[columns[context]].max for context in contexts)
    longest += max(manifest.lengths[answer].max for answer in ("chosen", "rejected"))
    if longest > architecture.max_sequence_length:
        raise UserError(
            f"{config.data.path}: sequences of up to {longest} tokens, but the model {config.model.path} has "
            f"{architecture.max_sequence_length} positions; prepare the data with --max-length, or extend the model in "
            "its config.json (rope_parameters, max_position_embeddings)"
        )


def training_batches(
    config: Config,
    dataset: TripletDataset,
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
        dataset,
        config.objective.roles.all,
        packing,
        global_batch_size=global_batch_size or config.training.global_batch_size,
        seed=config.seed,
    )


def single_pass(
    config: Config,
    dataset: TripletDataset,
    topology: Topology,
    label: str,
    roles: Sequence[Role] | None = None,
    before_batch: Callable[[], None] | None = None,
) -> Iterator[GlobalBatch]:
    """Every triplet once, with a progress bar named `label` on rank 0.

    A batch may repeat packs, so that all ranks have equally many; those are not `counted`.

    Args:
        roles: the sequences of a triplet that share a pack; None: those that the objective reads.
        before_batch: called before every batch, by all ranks together.
    """
    chunk_size = _SINGLE_PASS_TRIPLETS_PER_RANK * topology.data_group.size()
    roles = config.objective.roles.all if roles is None else roles
    batches = sequential_batches(dataset, roles, _packing(config, topology), chunk_size=chunk_size)
    total = -(-len(dataset) // chunk_size)
    for batch in tqdm(batches, label, total, unit="batch", disable=dist.get_rank() != 0, **bar_style("batches")):
        if before_batch is not None:
            before_batch()
        yield batch


def _packing(config: Config, topology: Topology) -> Packing:
    return Packing(
        sequence_multiple=topology.sequence_multiple,
        pack_multiple=topology.pack_multiple(config.model),
        max_tokens_per_pack=config.data.max_tokens_per_pack,
        max_triplets_per_pack=config.data.max_triplets_per_pack,
        dp_rank=topology.data_group.rank(),
        dp_size=topology.data_group.size(),
        packs_multiple=topology.packs_multiple,
        wanted_packs=topology.wanted_packs,
    )

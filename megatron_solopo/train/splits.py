"""The prepared data of a run, checked against its objective and its model."""

from dataclasses import dataclass

from megatron_solopo.config import Config
from megatron_solopo.data.dataset import TripletDataset
from megatron_solopo.data.prepared import PreparedManifest, load_prepared
from megatron_solopo.model.architecture import Architecture


@dataclass(frozen=True)
class Splits:
    """The training split and, where one was held out, the evaluation split."""

    manifest: PreparedManifest
    datasets: dict[str, TripletDataset]
    """By name: train, eval."""


def load_splits(config: Config, architecture: Architecture) -> Splits:
    """Open `data.path`.

    Raises ValueError if it is not complete, holds pairs where triplets are needed, was tokenized for a
    larger vocabulary than the model's, or has no held-out split where evaluation is asked for.
    """
    prepared = load_prepared(config.data.path)
    manifest = prepared.manifest
    if manifest.kind == "pair" and config.objective.name == "solopo":
        raise ValueError(
            f"{config.data.path}: holds plain pairs (prompt, chosen, rejected), but objective.name=solopo needs "
            "prompt_short and prompt_long; prepare triplets, or set objective.name=short_po"
        )
    if manifest.vocab_size > architecture.vocab_size:
        raise ValueError(
            f"{config.data.path}: tokenized with {manifest.vocab_size} tokens, but the model {config.model.path} "
            f"has {architecture.vocab_size}; prepare the data with the model's own tokenizer"
        )
    columns = {"short": prepared.prompt_column("short"), "long": prepared.prompt_column("long")}
    datasets = {"train": TripletDataset(prepared.train, columns)}
    if prepared.eval is not None:
        datasets["eval"] = TripletDataset(prepared.eval, columns)
    elif config.training.eval_steps is not None:
        raise ValueError(
            f"training.eval_steps={config.training.eval_steps}, but {config.data.path} has no held-out split; "
            "prepare it with --eval-count, or remove the key"
        )
    return Splits(manifest, datasets)

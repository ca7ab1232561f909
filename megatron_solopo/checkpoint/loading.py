"""Fills this rank's model chunks from a Hugging Face directory or from a Megatron checkpoint."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_solopo.checkpoint.distributed import load_parameters
from megatron_solopo.checkpoint.huggingface import SafetensorsDirectory
from megatron_solopo.checkpoint.mapping import EMBEDDING, OUTPUT, canonical_name, rules, to_megatron
from megatron_solopo.checkpoint.megatron import MegatronDirectory
from megatron_solopo.model.architecture import Architecture
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.precision import assign
from megatron_solopo.model_directory import is_megatron_checkpoint


def load_weights(chunks: Sequence[ResponseModel], architecture: Architecture, path: Path) -> None:
    """Fill every parameter of this rank from the model in `path`, cast to the model's precision.

    Raises ValueError naming missing, unexpected or misshapen tensors, before any parameter is touched.
    """
    if is_megatron_checkpoint(path):
        MegatronDirectory(path).check(architecture)
        load_parameters(path, chunks)
        return
    source = SafetensorsDirectory(path)
    source.check(architecture)
    table = rules(architecture)
    for chunk in chunks:
        group = chunk.pg_collection.tp
        share = {"rank": group.rank(), "size": group.size(), "padded_vocab": chunk.vocab_size}
        for name, parameter in global_parameters(chunk):
            assign(parameter, to_megatron(table[name], architecture, source.read, **share))


def global_parameters(chunk: ResponseModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This chunk's parameters by their name in the mapping table, layers counted over the whole model.

    With tied embeddings, the last pipeline stage's own copy appears under the embedding's name.
    """
    for name, parameter in chunk.named_parameters():
        if name.startswith("decoder.layers."):
            local, rest = name.removeprefix("decoder.layers.").split(".", 1)
            layer = chunk.decoder.layers[int(local)].layer_number - 1
            name = f"decoder.layers.{layer}.{rest}"
        if name == OUTPUT and chunk.share_embeddings_and_output_weights:
            name = EMBEDDING
        yield canonical_name(name), parameter

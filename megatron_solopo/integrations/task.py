"""SoLoPO in any training loop on Megatron-Core: packs, the response-only head, a forward step with its loss, metrics.

The loop keeps its own model, optimizer, schedule, logging and checkpoints. "Use it in your own loop" in
examples/megatron_lm/README.md shows a whole one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.config import Config
from megatron_solopo.data.loader import GlobalBatchLoader
from megatron_solopo.data.packing import Pack
from megatron_solopo.errors import UserError
from megatron_solopo.model.head import attach_response_head
from megatron_solopo.model.microbatch import Microbatch, shard_pack
from megatron_solopo.model.resolve import ResolvedModel, uses_transformer_engine
from megatron_solopo.objective import metric_names
from megatron_solopo.parallel.megatron_internals import pipeline_settings, set_rotary_frequencies
from megatron_solopo.parallel.topology import Topology, current
from megatron_solopo.train.callbacks import say
from megatron_solopo.train.metrics import reduce_sums
from megatron_solopo.train.reference import cached_reference
from megatron_solopo.train.run_data import load_run_datasets, training_batches
from megatron_solopo.train.step import LossFunction, forward_microbatch, objective_loss


def prepare_model(model: Any, architecture: Architecture, chunk_tokens: int) -> None:
    """Check a model chunk and its configuration, and give it the response-only head in place.

    Raises UserError naming each setting that differs from `architecture`, or that does not work with packs.
    """
    if not isinstance(model, GPTModel):
        raise UserError(
            f"the model is a {type(model).__name__}; expected a GPTModel (of any subclass), not yet wrapped"
        )
    _check_architecture(model, architecture)
    check_transformer_config(model.config)
    # Packs differ in length, so pipeline messages must carry shapes. Megatron-LM's arguments cannot say so.
    model.config.variable_seq_lengths = True
    set_rotary_frequencies(model, architecture.inv_freq.clone())
    attach_response_head(model, real_vocab_size=architecture.vocab_size, chunk_tokens=chunk_tokens)


def check_transformer_config(config: TransformerConfig) -> None:
    """Raise UserError naming the settings that give wrong gradients, or none, with packs of triplets."""
    wrong = {
        "calculate_per_token_loss": (config.calculate_per_token_loss, True),
        "hidden_dropout": (config.hidden_dropout, 0.0),
        "attention_dropout": (config.attention_dropout, 0.0),
        "fp16": (config.fp16, False),
        "num_moe_experts": (config.num_moe_experts, None),
        "mtp_num_layers": (config.mtp_num_layers, None),
        "defer_embedding_wgrad_compute": (config.defer_embedding_wgrad_compute, False),
        "tp_comm_overlap": (config.tp_comm_overlap, False),
        "cuda_graph_impl": (config.cuda_graph_impl, "none"),
    }
    if config.virtual_pipeline_model_parallel_size is not None:
        exchange = pipeline_settings(interleaved=True)
        wrong |= {name: (getattr(config, name), exchange[name]) for name in ("overlap_p2p_comm", "batch_p2p_comm")}
    _refuse(wrong, "the model's TransformerConfig does not work with packs of triplets")


def _check_architecture(model: GPTModel, architecture: Architecture) -> None:
    config, a = model.config, architecture
    scale = config.softmax_scale or 1 / math.sqrt(config.kv_channels)
    settings: dict[str, tuple[Any, Any]] = {
        "num_layers": (config.num_layers, a.num_layers),
        "hidden_size": (config.hidden_size, a.hidden_size),
        "ffn_hidden_size": (config.ffn_hidden_size, a.ffn_hidden_size),
        "num_attention_heads": (config.num_attention_heads, a.num_attention_heads),
        "num_query_groups": (config.num_query_groups or config.num_attention_heads, a.num_query_groups),
        "kv_channels": (config.kv_channels, a.head_dim),
        "layernorm_epsilon": (config.layernorm_epsilon, a.layernorm_epsilon),
        "softmax_scale": (a.softmax_scale if math.isclose(scale, a.softmax_scale) else scale, a.softmax_scale),
        "add_qkv_bias": (config.add_qkv_bias, a.add_qkv_bias),
        "qk_layernorm": (config.qk_layernorm, a.qk_layernorm),
        "normalization": (config.normalization, "RMSNorm"),
        "gated_linear_unit": (config.gated_linear_unit, True),
        "add_bias_linear": (config.add_bias_linear, False),
        "rotary_interleaved": (config.rotary_interleaved, False),
        "position_embedding_type": (model.position_embedding_type, "rope"),
        "share_embeddings_and_output_weights": (model.share_embeddings_and_output_weights, a.tied_embeddings),
        "vocab_size": (min(model.vocab_size, a.vocab_size), a.vocab_size),
    }
    _refuse(settings, "the model differs from config.json")


def _refuse(settings: dict[str, tuple[Any, Any]], problem: str) -> None:
    differing = [
        f"{name} is {found!r}, expected {expected!r}"
        for name, (found, expected) in settings.items()
        if found != expected
    ]
    if differing:
        raise UserError(f"{problem}: {'; '.join(differing)}")


class PreferenceTask:
    """Data, objective and reference of one run, on the process groups that Megatron-Core already has.

    It reads these parts of the config: `model`, `data`, `objective`, `logprob`, `reference`, `seed`,
    `training.global_batch_size` and the sizes in `parallel`. The loop decides everything else.

    Raises UserError if there are no process groups yet, or if the data does not fit the model or the objective. The
    same holds for a reference cache that is missing, or was made for another model or other data.
    """

    def __init__(self, config: Config, topology: Topology | None = None) -> None:
        self.config = config
        self.topology = topology or current()
        self.architecture = read_architecture(config.model.path)
        # `resolve_model` would refuse layouts that the loop may have: stages of unequal length, for example.
        self.model = ResolvedModel(
            config.model, config.parallel, self.architecture, uses_transformer_engine(config.model)
        )
        self.datasets = load_run_datasets(config, self.architecture)
        for note in self.datasets.notes:
            say(note)
        self.metric_names = metric_names(config.objective)
        """Names of the metrics in a report, in its order. `megatron_solopo.objective` explains them."""
        references = cached_reference(config, self.model, self.datasets) if config.objective.needs_reference else {}
        self._losses: dict[str, Callable[[Microbatch], LossFunction]] = {
            name: objective_loss(config.objective, references.get(name), self.topology)
            for name in self.datasets.by_split
        }

    def prepare_model(self, model: Any) -> Any:
        """Give a GPTModel the response-only head and the rotary frequencies of config.json, and return it.

        Call it on every chunk before Float16Module or DistributedDataParallel wrap it. Parameters and their names stay.

        Raises UserError naming what in the model differs from `config.model.path`. It also names what in its
        TransformerConfig does not work with packs or with the mean over triplets.
        """
        prepare_model(model, self.architecture, self.config.logprob.chunk_tokens)
        return model

    def batches(
        self, split: str = "train", *, global_batch_size: int | None = None, packs_multiple: int | None = None
    ) -> GlobalBatchLoader:
        """Return endless shuffled global batches: `next_batch().packs` are this rank's micro-batches of the next step.

        All ranks get the same number of packs. Packs differ in length, and their number may change from step to step.
        A loop that needs a constant number asks for a multiple that is large enough for every step.

        Args:
            split: `train`, or `eval` if the data has it.
            global_batch_size: triplets per batch over all ranks. None takes `training.global_batch_size`.
            packs_multiple: the number of packs on each rank is a multiple of this.
        """
        return training_batches(
            self.config,
            self.datasets.by_split[split],
            self.topology,
            global_batch_size=global_batch_size,
            packs_multiple=packs_multiple,
        )

    def forward_step(self, iterator: Iterator[Pack], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """Run the next pack of the training split, as the `forward_step_func` of Megatron-Core's schedules.

        Returns the model's output and the loss function. For one pack the loss function returns three values: the
        summed loss times CP (a scalar), the number of triplets (int), and the report. The report holds fp32 sums over
        those triplets, one per name in `metric_names`. With `calculate_per_token_loss` the gradient is that of the
        mean over the triplets of the global batch.
        """
        return self.forward(next(iterator), model, "train")

    def forward(self, pack: Pack, model: torch.nn.Module, split: str) -> tuple[Tensor, LossFunction]:
        """Run one pack of a split; see `forward_step`."""
        return forward_microbatch(model, shard_pack(pack, self.topology), self._losses[split])

    def mean_metrics(self, reports: Sequence[Tensor], num_triplets: int) -> dict[str, float]:
        """Return the mean metrics of a step, the same on every rank. All ranks must call it.

        Args:
            reports: what the schedule returned; an empty list on all pipeline stages but the last.
            num_triplets: triplets of the global batch, over all ranks.
        """
        sums = reduce_sums(reports, len(self.metric_names), self.topology)
        return {name: total / num_triplets for name, total in zip(self.metric_names, sums, strict=True)}

"""SoLoPO in any training loop on Megatron-Core: packs, the response-only head, a forward step with its loss, metrics.

The loop keeps its own model, optimizer, schedule, logging and checkpoints. "Use it in your own loop" in
examples/megatron_lm/README.md shows a whole one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_solopo.architecture.adapters import check_targets
from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.architecture.layout import check_training
from megatron_solopo.checkpoint.adapter_checkpoint import adapter_files
from megatron_solopo.checkpoint.model_files import read_model_files
from megatron_solopo.config import Config, ParallelConfig
from megatron_solopo.data.loader import GlobalBatchLoader, LoaderSource
from megatron_solopo.data.packing import Pack
from megatron_solopo.errors import UserError
from megatron_solopo.model.adapters import set_dropout
from megatron_solopo.model.attention import attach_shared_prompts
from megatron_solopo.model.head import attach_response_head
from megatron_solopo.model.head_norms import AllHeadsNormAttention
from megatron_solopo.model.layers import layers_with_experts
from megatron_solopo.model.microbatch import Microbatch, shard_pack
from megatron_solopo.model.resolve import ResolvedModel, check_attention, uses_transformer_engine
from megatron_solopo.model.routing import RouterWatch
from megatron_solopo.objective import metric_names
from megatron_solopo.parallel.megatron_internals import pipeline_settings, set_rotary_frequencies
from megatron_solopo.parallel.topology import Topology, current
from megatron_solopo.train.callbacks import say
from megatron_solopo.train.identity import model_fingerprint
from megatron_solopo.train.metrics import reduce_sums
from megatron_solopo.train.policy import check_starts_whole, set_trainable
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
    attach_shared_prompts(model, parallel_state.get_context_parallel_group())
    attach_response_head(model, real_vocab_size=architecture.vocab_size, chunk_tokens=chunk_tokens)


def check_transformer_config(config: TransformerConfig) -> None:
    """Raise UserError naming the settings that give wrong gradients, or none, with packs of triplets."""
    wrong = {
        "calculate_per_token_loss": (config.calculate_per_token_loss, True),
        "hidden_dropout": (config.hidden_dropout, 0.0),
        "attention_dropout": (config.attention_dropout, 0.0),
        "fp16": (config.fp16, False),
        "mtp_num_layers": (config.mtp_num_layers, None),
        "defer_embedding_wgrad_compute": (config.defer_embedding_wgrad_compute, False),
        "tp_comm_overlap": (config.tp_comm_overlap, False),
        "cuda_graph_impl": (config.cuda_graph_impl, "none"),
    }
    if config.virtual_pipeline_model_parallel_size is not None:
        exchange = pipeline_settings(interleaved=True)
        wrong |= {name: (getattr(config, name), exchange[name]) for name in ("overlap_p2p_comm", "batch_p2p_comm")}
    if config.num_moe_experts is not None:
        wrong |= _expert_settings(config)
    if config.fp8 and config.fp8_recipe == "delayed":
        wrong["fp8_recipe"] = (config.fp8_recipe, "tensorwise")
    _refuse(wrong, "the model's TransformerConfig does not work with packs of triplets")


_REMARKS = {
    # Nothing here warms the scales before the first step, and evaluation would not be in the reference's bfloat16.
    "fp8_recipe": " (--fp8-recipe tensorwise or blockwise; only `megatron-solopo train` prepares scales of delayed)",
    "moe_token_dispatcher_type": " (only `megatron-solopo train` accepts flex)",
}
"""What the refusal of a setting adds."""


def _expert_settings(config: TransformerConfig) -> dict[str, tuple[Any, Any]]:
    """Each setting of experts, found and expected. Names that this version does not have cannot be wrong."""
    expected = {
        # With other packs on every rank, ranks have different numbers of tokens.
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        # The routes must be those of transformers, and no token may be dropped.
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_topk_scaling_factor": None,
        "moe_router_num_groups": None,
        "moe_router_force_load_balancing": False,
        "moe_router_force_biased": None,
        "moe_input_jitter_eps": None,
        "moe_expert_capacity_factor": None,
        "moe_expert_rank_capacity_factor": None,
        "moe_apply_probs_on_input": False,
        "moe_latent_size": None,
    }
    wrong = {name: (getattr(config, name, value), value) for name, value in expected.items()}
    # Megatron multiplies its losses by tokens, because it divides by them. Here triplets divide.
    wrong["moe_z_loss_coeff"] = (config.moe_z_loss_coeff or None, None)
    kinds, coefficients = (
        value if isinstance(value, list) else [value]
        for value in (config.moe_router_load_balancing_type, config.moe_aux_loss_coeff)
    )
    if not set(kinds) <= {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"}:
        wrong["moe_router_load_balancing_type"] = (config.moe_router_load_balancing_type, "none")
    if any(coefficients):
        wrong["moe_aux_loss_coeff"] = (config.moe_aux_loss_coeff, 0.0)
    if config.tensor_model_parallel_size > 1:
        wrong["sequence_parallel"] = (config.sequence_parallel, True)
    return wrong


def _check_architecture(model: GPTModel, architecture: Architecture) -> None:
    config, a = model.config, architecture
    scale = config.softmax_scale or 1 / math.sqrt(config.kv_channels)
    settings: dict[str, tuple[Any, Any]] = {
        "num_layers": (config.num_layers, a.num_layers),
        "hidden_size": (config.hidden_size, a.hidden_size),
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
    norms_all_heads = any(isinstance(each, AllHeadsNormAttention) for each in model.modules())
    settings["norms_all_heads"] = (norms_all_heads, a.norms_all_heads)
    experts = a.experts
    if experts is None or not experts.in_all_layers:
        settings["ffn_hidden_size"] = (config.ffn_hidden_size, a.ffn_hidden_size)
    settings["num_moe_experts"] = (config.num_moe_experts, None if experts is None else experts.num_experts)
    if experts is not None and config.num_moe_experts is not None:
        settings |= {
            "moe_router_topk": (config.moe_router_topk, experts.topk),
            "moe_ffn_hidden_size": (config.moe_ffn_hidden_size, experts.ffn_hidden_size),
            "moe_router_pre_softmax": (config.moe_router_pre_softmax, not experts.renormalizes),
            "moe_layer_freq": (layers_with_experts(config), list(experts.layers)),
            "moe_shared_expert_intermediate_size": (
                config.moe_shared_expert_intermediate_size or 0,
                experts.shared_ffn_hidden_size,
            ),
            "moe_shared_expert_gate": (config.moe_shared_expert_gate, experts.shared_ffn_hidden_size > 0),
        }
    _refuse(settings, "the model differs from config.json")


def _refuse(settings: dict[str, tuple[Any, Any]], problem: str) -> None:
    differing = [
        f"{name} is {found!r}, expected {expected!r}{_REMARKS.get(name, '')}"
        for name, (found, expected) in settings.items()
        if found != expected
    ]
    if differing:
        raise UserError(f"{problem}: {'; '.join(differing)}")


def _check_groups(parallel: ParallelConfig) -> None:
    """Raise UserError naming each size that the loop's process groups do not have."""
    made = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    wanted = {name: getattr(parallel, name) for name in made}
    wanted["expert_tensor_parallel_size"] = parallel.expert_tensor_size
    differing = [
        f"parallel.{name}={wanted[name]}, but the loop made {made[name]}" for name in made if wanted[name] != made[name]
    ]
    if differing:
        raise UserError(
            f"the process groups differ from the configuration: {'; '.join(differing)}; give initialize_model_parallel "
            "the sizes of the configuration"
        )


class PreferenceTask:
    """Data, objective and reference of one run, on the process groups that Megatron-Core already has.

    All ranks create it together. With `lora` they read the model's weights once, if their checksums are not known yet.

    It reads these parts of the config: `model`, `lora`, `data`, `objective`, `logprob`, `reference`, `moe`, `seed`,
    `training.global_batch_size` and the sizes in `parallel`. The loop decides everything else.

    Args:
        counts_routes: whether the loop calls `mean_metrics`, which say how the tokens of a model with experts were
            routed. Otherwise nothing is counted.

    Raises UserError if there are no process groups yet, or if their sizes are not those in `parallel`. The same holds
    for data that does not fit the model or the objective. It also holds for a reference cache that is missing, or was
    made for another model or other data.
    """

    def __init__(self, config: Config, topology: Topology | None = None, *, counts_routes: bool = True) -> None:
        self.config = config
        self.topology = topology or current()
        _check_groups(config.parallel)
        self.architecture = read_architecture(config.model.path)
        check_targets(self.architecture, config)
        check_starts_whole(config.model.path)
        check_training(self.architecture, config.parallel, config.optimizer, config.moe)
        # `resolve_model` would refuse layouts that the loop may have: stages of unequal length, for example.
        self.model = ResolvedModel(
            config.model, config.parallel, self.architecture, uses_transformer_engine(config.model)
        )
        check_attention(self.model, config)
        self.datasets = load_run_datasets(config, self.architecture)
        for note in self.datasets.notes:
            say(note)
        self.metric_names = metric_names(config.objective)
        """Names of the metrics in a report, in its order. `megatron_solopo.objective` explains them."""
        self._router_watch = RouterWatch((), config.moe, counts_routes=counts_routes)
        balances = config.moe.aux_loss_coefficient or config.moe.z_loss_coefficient
        has_experts = self.architecture.experts is not None
        self._watched = {"train": has_experts and bool(counts_routes or balances or config.moe.replay)}
        """Whether routers are watched, by split."""
        self._watched["eval"] = has_experts and bool(config.moe.replay)
        references = cached_reference(config, self.model, self.datasets) if config.objective.needs_reference else {}
        self._losses: dict[str, Callable[[Microbatch], LossFunction]] = {
            name: objective_loss(config.objective, references.get(name), self.topology)
            for name in self.datasets.by_split
        }
        path, lora = config.model.path, config.lora
        self.adapter_files = {} if lora is None else adapter_files(lora, path, model_fingerprint(path))
        """The files beside a checkpoint of adapters that say what they belong to, by name. None without `lora`."""

    def prepare_model(self, model: Any) -> Any:
        """Give a GPTModel the response-only head and the rotary frequencies of config.json, and return it.

        Routers of experts are watched, and learn only with `moe.router_trainable`. With `lora` the model is frozen and
        gets its adapters. `load_weights` may read the model before or after that.

        Call it on every chunk before Float16Module or DistributedDataParallel wrap it. Parameters and their names stay.

        Raises UserError naming what in the model differs from `config.model.path`. It also names what in its
        TransformerConfig does not work with packs or with the mean over triplets. `model.adapter` may not fit.
        """
        prepare_model(model, self.architecture, self.config.logprob.chunk_tokens)
        if self.config.moe.replay:
            _refuse({"moe_router_fusion": (model.config.moe_router_fusion, False)}, "moe.replay=short replays nothing")
        if self.config.lora is not None and not len(model.decoder.layers):
            raise UserError("lora: this model chunk has no layers, so no adapters to train; give every chunk a layer")
        set_trainable([model], self.architecture, self.config)
        self._router_watch.attach(model)
        return model

    def model_files(self) -> dict[str, bytes]:
        """What a checkpoint's folder `huggingface/` must hold so that our commands take the checkpoint as a model.

        With `lora` these files describe the adapters, too.
        """
        return read_model_files(self.config.model.path) | self.adapter_files

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
            [LoaderSource(self.datasets.by_split[split], self.config.objective.roles.all)],
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
        set_dropout([model], is_training=split == "train")
        microbatch = shard_pack(
            pack,
            self.topology,
            with_places=self._watched[split],
            is_trained=split == "train",
            aligns_tokens=self.config.objective.aligns_tokens,
            all_segments=get_attr_wrapped_model(model, "reads_all_segments"),
        )
        return forward_microbatch(model, microbatch, self._losses[split])

    def mean_metrics(self, reports: Sequence[Tensor], num_triplets: int) -> dict[str, float]:
        """Return the mean metrics of a step, the same on every rank. All ranks must call it after every step.

        With experts, `moe/*` describe the routes of the training packs since the last call. They are absent if there
        were none, so evaluation has none.

        Args:
            reports: what the schedule returned; an empty list on all pipeline stages but the last.
            num_triplets: triplets of the global batch, over all ranks.
        """
        sums = reduce_sums(reports, len(self.metric_names), self.topology)
        means = {name: total / num_triplets for name, total in zip(self.metric_names, sums, strict=True)}
        experts = self.architecture.experts
        if experts is None:
            return means
        routed = self._router_watch.metrics(
            self.architecture.num_layers, experts.num_experts, experts.topk, self.topology.device
        )
        self._router_watch.reset()
        return means | routed

"""The configuration of a run: its sections, keys, types, defaults and legal values.

The keys of parallelism and of the optimizer have Megatron-Core's names; those of the objective have TRL's. The string
below a key is its documentation.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Strict,
    field_validator,
    model_validator,
)

from megatron_solopo.errors import UserError

LossType = Literal[
    "dpo", "simpo", "orpo", "ipo", "cpo", "hinge", "robust", "dpo_norm", "apo_zero", "apo_down", "exo_pair", "nca_pair",
    "sppo_hard",
]  # fmt: skip
LOSS_ALIASES: dict[str, LossType] = {"sigmoid": "dpo", "sigmoid_norm": "dpo_norm"}
"""TRL's name of a loss -> ours, where they differ."""
ObjectiveName = Literal["solopo", "short_po", "long_po", "sft"]
FP8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
Context = Literal["short", "long"]
Response = Literal["chosen", "rejected"]

_Path = Annotated[Path, Strict(False)]  # YAML holds it as a string
_Decay = Annotated[float, Field(ge=0, lt=1)]

_PAPER_ALPHA = {"dpo": 3.0}
_WITHOUT_REFERENCE = ("simpo", "orpo", "cpo")
_SMOOTHED = {"dpo": "[0, 0.5]", "robust": "[0, 0.5)", "exo_pair": "(0, 0.5)"}
"""The losses that read `label_smoothing`, and its legal values."""


class Section(BaseModel):
    """A part of the configuration: frozen, and strict about keys and types."""

    # Strict: `true` is not a number, and 1.5 is not an integer.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    """The model that is trained."""

    path: _Path
    """Hugging Face directory (config.json, safetensors weights, tokenizer), or a Megatron checkpoint that `convert
    import` or `train` wrote."""
    adapter: _Path | None = None
    """Directory of a PEFT adapter to start from; it needs `lora`. null: fresh adapters, where `lora` is set."""
    implementation: Literal["auto", "local", "transformer_engine"] = "auto"
    """Kernels of the layers. auto: Transformer Engine if it is installed and there is a GPU, else local. local: plain
    PyTorch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation. With bfloat16, the optimizer keeps float32 master weights."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """Format of FP8 matrix products in the transformer layers. null: no FP8. hybrid: e5m2 for gradients, e4m3 for the
    rest. FP8 needs Transformer Engine. Attention and the output layer stay in bfloat16."""
    fp8_recipe: FP8Recipe = "blockwise"
    """How FP8 values are scaled. blockwise: per 128 values of one token, so that a sequence does not depend on the
    other sequences of its pack. tensorwise and delayed: per tensor, over the whole pack. mxfp8: per 32 values
    (Blackwell GPUs). delayed takes the scales of earlier packs; scoring without gradients then runs in bfloat16."""
    fp8_param: bool = False
    """Keep the weights of the layers in FP8. This halves their memory and the data-parallel gather. Checkpoints and
    exports then hold the FP8 values; the optimizer's state holds the exact master weights."""
    first_last_layers_bf16: bool = False
    """With `fp8`, run the first and the last layers in bfloat16."""
    num_layers_at_start_in_bf16: NonNegativeInt = 1
    """How many first layers `first_last_layers_bf16` means."""
    num_layers_at_end_in_bf16: NonNegativeInt = 1
    """How many last layers `first_last_layers_bf16` means."""

    @property
    def has_delayed_scales(self) -> bool:
        """Whether earlier passes with gradients decide how FP8 values are scaled, so that each leaves a trace."""
        return self.fp8 is not None and self.fp8_recipe == "delayed"

    @property
    def without_gradients(self) -> "ModelConfig":
        """The precision of a model that is scored and not trained.

        Such passes would never update delayed scales, so they take bfloat16.
        """
        return self.model_copy(update={"fp8": None, "fp8_param": False}) if self.has_delayed_scales else self


class SourceConfig(Section):
    """One of several sets of rows that a run reads together."""

    path: _Path
    """Directory that `megatron-solopo data prepare` wrote."""
    weight: PositiveFloat = 1.0
    """Its share of the rows of a batch is this, divided by the sum over all sources."""
    objective: ObjectiveName | None = None
    """`objective.name` for these rows. null: that of the run. The other keys of `objective` are the same for all."""
    name: str | None = None
    """Its name in metrics and in the reference cache. null: the last part of `path`."""

    @property
    def known_as(self) -> str:
        """`name`, or the last part of `path`."""
        return self.path.name if self.name is None else self.name


class DataConfig(Section):
    """The rows, and how they are packed."""

    path: _Path | None = Field(default=None, examples=["prepared"])
    """Directory that `megatron-solopo data prepare` wrote. null: `sources` names several."""
    sources: Annotated[list[SourceConfig], Field(min_length=1)] | None = Field(
        default=None,
        examples=[[{"path": "triplets", "weight": 3}, {"path": "chats", "weight": 1, "objective": "sft"}]],
    )
    """Several such directories, mixed in every batch. Each has `path`, `weight`, `objective` and `name`; the guide to
    data explains them. null: `path` alone."""
    max_tokens_per_pack: PositiveInt = Field(examples=[32768])
    """Most tokens of one pack (micro-batch). The padding of each sequence counts. Context parallelism divides the pack
    afterwards. A pipeline gets smaller packs if it would wait otherwise."""
    max_triplets_per_pack: PositiveInt | None = Field(default=None, examples=[4])
    """Most triplets of one pack. null: no limit. 1: no packing."""
    share_prompts: bool = True
    """Compute a prompt once for the chosen and the rejected response behind it. The result is the same up to rounding.
    false: each response has its own copy of the prompt, as in most other trainers. Under context parallelism, shared
    prompts need all keys and values on every rank; `plan --vary share_prompts` says which is faster."""

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if (self.path is None) == (self.sources is None):
            raise UserError("needs either path, a directory of data prepare, or sources, a list of several")
        names = [source.known_as for source in self.sources or ()]
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise UserError(f"sources: the name {name!r} has other characters than A-Z a-z 0-9 . _ -; set its name")
            if names.count(name) > 1:
                raise UserError(f"sources: several are called {name!r}; give each a name of its own")
        return self

    @property
    def directory(self) -> Path:
        """`path`. Raises UserError if there are `sources` instead, for what reads one set of rows."""
        if self.path is None:
            raise UserError(
                "data.sources: only `train`, `reference` and `plan` read several sources; set data.path=DIR "
                "data.sources=null"
            )
        return self.path


class TrainingConfig(Section):
    """Length of the run, batch size, and what happens between steps."""

    global_batch_size: PositiveInt = Field(examples=[64])
    """Rows (triplets, pairs, instructions) per optimizer step, over all ranks."""
    max_steps: PositiveInt | None = Field(default=None, examples=[1000])
    """Optimizer steps of the run. null: `num_train_epochs` decides."""
    num_train_epochs: PositiveFloat = 1.0
    """How often the run reads the data, if `max_steps` is null. With `data.sources`, once means as many rows as all of
    them hold."""
    eval_steps: PositiveInt | None = Field(default=None, examples=[100])
    """Evaluate the held-out split every this many steps, and at the end. null: never."""
    try_largest_pack: bool | None = Field(default=None, examples=[True])
    """Run forward and backward of the largest pack before the first step, so that a lack of memory shows at once. null:
    only on GPUs. It takes as long as that pack takes in a step, once for each pack that a pipeline keeps."""
    max_skipped_steps_in_a_row: PositiveInt = 10
    """A step whose loss or gradient is NaN or infinite is skipped: it updates nothing. After this many skipped steps in
    a row, the run saves the state from before the first of them and ends with an error."""
    manual_gc: bool | None = Field(default=None, examples=[True])
    """Collect Python's garbage after the same steps on all ranks, and at no other moment, so that ranks do not wait for
    each other. null: on if there is more than one process."""
    manual_gc_interval: PositiveInt = 50
    """Steps between two such collections."""


class ParallelConfig(Section):
    """Megatron-Core's parallel sizes. The rest of the world size is data parallel."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each layer (TP)."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that the layers are divided into (PP)."""
    virtual_pipeline_model_parallel_size: Annotated[int, Field(ge=2)] | None = Field(default=None, examples=[2])
    """Model chunks of each pipeline rank, for the interleaved schedule. null: one chunk and the plain schedule."""
    pipeline_model_parallel_layout: str | None = Field(default=None, examples=["'Et*7|(t*8|)*2t*7L'"])
    """Layers of each pipeline stage: E embedding, t layer, L loss, | next stage, *N repeats. `Et*7|(t*8|)*2t*7L` has
    four stages, and counts embedding and loss as a layer each. On a command line, put the whole override in quotes:
    `'parallel.pipeline_model_parallel_layout=Et*3|t*3L'`. Otherwise the shell takes `|` for a pipe. null: all stages
    have the same number of layers."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence (CP)."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share the experts of each layer (EP). They are ranks of TP, CP and DP, which keep their roles outside
    the experts."""
    expert_tensor_parallel_size: PositiveInt | None = None
    """Ranks that share each expert. null: as many as TP."""
    moe_token_dispatcher_type: Literal["alltoall", "flex"] = "alltoall"
    """How tokens reach the ranks of their experts. alltoall: by the collective of that name. flex: by DeepEP, which
    needs GPUs and its package `deep_ep`."""
    sequence_parallel: bool | None = Field(default=None, examples=[True])
    """Divide activations outside attention among the tensor-parallel ranks. null: on if TP is above 1."""
    cp_comm_type: Literal["p2p", "a2a", "a2a+p2p"] = "p2p"
    """How context-parallel ranks exchange keys and values in Transformer Engine's attention. p2p: in a ring. a2a: by
    heads; the heads of a tensor-parallel rank must then be a multiple of CP. a2a+p2p: by heads among near ranks, in a
    ring between such groups. Plain PyTorch's attention always gathers them."""
    hierarchical_context_parallel_sizes: list[Annotated[int, Field(ge=2)]] | None = Field(
        default=None, examples=[[4, 2]]
    )
    """For `cp_comm_type: a2a+p2p`: how many ranks exchange heads, and how many such groups form a ring. Their product
    is CP. The heads of a tensor-parallel rank must be a multiple of the first."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel communication with matrix products. true is refused: Transformer Engine's buffers for it
    hold one number of tokens, and packs differ in length."""
    overlap_grad_reduce: bool | None = Field(default=None, examples=[True])
    """Reduce the gradients of later layers while backward computes those of earlier layers. null: on GPUs if several
    ranks share a gradient (DP x CP above 1)."""
    overlap_param_gather: bool | None = Field(default=None, examples=[True])
    """Gather the updated parameters of later layers while forward computes earlier layers. It needs
    `overlap_grad_reduce` and `optimizer.use_distributed_optimizer`. null: on where both are."""
    num_distributed_optimizer_instances: PositiveInt = 1
    """Copies of the optimizer's state. Each copy is divided among DP x CP / copies consecutive ranks, so parameters are
    gathered within fewer nodes. Gradients are also reduced between the copies."""
    distributed_timeout_minutes: PositiveFloat = 60.0
    """Minutes until a collective fails (gloo) or ends the process (NCCL). The limits of `watchdog` should be shorter,
    because the watchdog names the ranks that are missing."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """What the backward pass computes again to save memory. null: nothing. full: whole layers. selective:
    `recompute_modules` of each layer."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Which layers `recompute_granularity: full` means. uniform: all, in groups of `recompute_num_layers`. block: the
    first `recompute_num_layers` of each pipeline stage."""
    recompute_num_layers: PositiveInt = 1
    """Layers per group (uniform) or per pipeline stage (block)."""
    recompute_modules: list[Literal["core_attn", "mlp"]] = Field(default=["core_attn"])
    """What `recompute_granularity: selective` computes again."""
    cpu_offloading_num_layers: NonNegativeInt = 0
    """Layers whose activations stay in host memory until the backward pass. It needs a GPU and Transformer Engine."""

    @model_validator(mode="after")
    def _check_context_exchange(self) -> Self:
        kind, sizes, cp = self.cp_comm_type, self.hierarchical_context_parallel_sizes, self.context_parallel_size
        if kind != "a2a+p2p":
            if sizes is not None:
                raise UserError(f"hierarchical_context_parallel_sizes={sizes} has no effect with cp_comm_type={kind}")
        elif sizes is None or len(sizes) != 2 or math.prod(sizes) != cp:
            raise UserError(
                "cp_comm_type=a2a+p2p needs hierarchical_context_parallel_sizes=[heads,ring], two numbers above 1 "
                f"whose product is context_parallel_size={cp}"
            )
        return self

    @model_validator(mode="after")
    def _check_overlap(self) -> Self:
        if self.tp_comm_overlap:
            raise UserError(
                "tp_comm_overlap=true cannot work: Transformer Engine's user buffers hold exactly one number of "
                "tokens, and packs differ in length; set it to false"
            )
        if self.overlap_param_gather and self.overlap_grad_reduce is False:
            raise UserError("overlap_param_gather=true needs overlap_grad_reduce=true, which divides the parameters")
        return self

    @property
    def uses_sequence_parallel(self) -> bool:
        """Whether the tensor-parallel ranks divide the activations outside attention."""
        return self.tensor_model_parallel_size > 1 if self.sequence_parallel is None else self.sequence_parallel

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share each expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def expert_sizes(self) -> dict[str, int]:
        """Both sizes of expert parallelism by their keys; empty without expert parallelism."""
        if self.expert_model_parallel_size == 1:
            return {}
        return {
            "expert_model_parallel_size": self.expert_model_parallel_size,
            "expert_tensor_parallel_size": self.expert_tensor_size,
        }

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share one replica of the model: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


class MoEConfig(Section):
    """The routers of a mixture of experts. No token is dropped, and routers compute in float32."""

    router_trainable: bool = False
    """Train the routers, too. Preference pairs are few, and a router that moves sends tokens to experts that have not
    learned them."""
    aux_loss_coefficient: NonNegativeFloat = 0.0
    """Weight of the load-balancing loss of each layer with experts (Switch Transformer, as in transformers). It is
    computed for every sequence, and its mean over the sequences of a row, then over the rows of a step, is added. It
    needs `router_trainable`."""
    z_loss_coefficient: NonNegativeFloat = 0.0
    """Weight of the squared log-sum-exp of router logits (ST-MoE), mean over the tokens of a sequence, then as that of
    `aux_loss_coefficient`. It needs `router_trainable`."""
    replay: Literal["short"] | None = None
    """short: a response token behind the long context goes to the experts that compute it behind the short one. An
    experiment: see the guide. It counts in training, in its evaluation and for the reference. null: routers choose
    behind both."""

    @model_validator(mode="after")
    def _check_losses(self) -> Self:
        for name in ("aux_loss_coefficient", "z_loss_coefficient"):
            if getattr(self, name) and not self.router_trainable:
                raise UserError(f"{name}={getattr(self, name)} needs router_trainable=true; set one of the two")
        return self


TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoRAConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685), in PEFT's words. They alone are trained. `lora: null`, the default,
    trains the whole model."""

    rank: PositiveInt = 16
    """Rank of each adapter (PEFT: `r`)."""
    alpha: PositiveFloat = 32.0
    """Scale (PEFT: `lora_alpha`): an adapter's output is multiplied by alpha / rank."""
    use_rslora: bool = False
    """Divide alpha by the root of the rank (arXiv 2312.03732)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a number of an adapter's input is dropped in training (PEFT: `lora_dropout`)."""
    target_modules: Annotated[list[TargetModule], Field(min_length=1)] | Literal["all-linear"] = Field(
        default="all-linear", examples=[["q_proj", "v_proj"]]
    )
    """The linear layers that have an adapter. all-linear: those of attention and of the feed-forward."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _check_targets(cls, value: Any) -> Any:
        """One message, where a union would have one for each of its parts."""
        legal = get_args(TargetModule)
        is_list = isinstance(value, list) and bool(value) and all(each in legal for each in value)
        if value != "all-linear" and not is_list:
            raise UserError(f"must be all-linear, or a list of some of {', '.join(legal)}; not {value}")
        return value

    @property
    def scaling(self) -> float:
        """The factor on an adapter's output."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


class Role(StrEnum):
    """One sequence of a triplet: a prompt with the short or the long context, and one of the two responses."""

    SHORT_CHOSEN = "short_chosen"
    SHORT_REJECTED = "short_rejected"
    LONG_CHOSEN = "long_chosen"
    LONG_REJECTED = "long_rejected"

    @property
    def context(self) -> Context:
        """Which prompt the sequence starts with."""
        return "short" if self in (Role.SHORT_CHOSEN, Role.SHORT_REJECTED) else "long"

    @property
    def response(self) -> Response:
        """Which response the sequence ends with."""
        return "chosen" if self in (Role.SHORT_CHOSEN, Role.LONG_CHOSEN) else "rejected"

    @property
    def on_short_context(self) -> "Role":
        """The sequence with the same response and the short context."""
        return Role(f"short_{self.response}")


def prompt_groups(roles: Sequence[Role], share_prompts: bool) -> tuple[tuple[int, ...], ...]:
    """Numbers of the roles whose sequences lie behind one copy of their prompt.

    They are those with the same prompt, in their order. Without sharing, each role is alone.
    """
    if not share_prompts:
        return tuple((number,) for number in range(len(roles)))
    contexts = dict.fromkeys(role.context for role in roles)
    return tuple(tuple(n for n, role in enumerate(roles) if role.context == context) for context in contexts)


@dataclass(frozen=True)
class Roles:
    """The sequences of a row that an objective reads."""

    pair: tuple[Role, ...]
    """The chosen and the rejected sequence that the preference loss compares. Of sft, the chosen one alone."""
    aligned: tuple[Role, ...] = ()
    """The long sequences whose reward is aligned to the reward on the short context."""

    @property
    def all(self) -> tuple[Role, ...]:
        """The pair, then the aligned sequences. Packs and caches of the reference keep this order."""
        return self.pair + self.aligned


class ObjectiveConfig(Section):
    """The loss. `megatron_solopo.objective` holds the formulas."""

    name: ObjectiveName = "solopo"
    """solopo: the pair loss on the short context, plus the alignment of rewards between the short and the long context.
    short_po, long_po: the pair loss alone, on that context. long_po is the usual method. sft: the negative
    log-likelihood per token of the chosen response, or of an instruction's completion, behind the short context."""
    loss_type: LossType = "dpo"
    """The pair loss, and the reward that belongs to it. TRL's names `sigmoid` and `sigmoid_norm` stand for dpo and
    dpo_norm."""
    beta: PositiveFloat = 0.1
    """Scale of the reward. orpo has none."""
    gamma: NonNegativeFloat = 0.5
    """Target margin of simpo (TRL's `simpo_gamma`)."""
    orpo_lambda: NonNegativeFloat = 1.0
    """Weight of the odds-ratio term of orpo (TRL's `beta`)."""
    label_smoothing: float = 0.0
    """Probability that a preference label is wrong. dpo (as cDPO) takes 0 to 0.5, robust less than 0.5. exo_pair needs
    more than 0 and less than 0.5; its paper takes 0.001. The other losses take only 0."""
    nll_coefficient: NonNegativeFloat = 0.0
    """Weight of an added negative log-likelihood per token of the chosen response."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = Field(default=None, examples=[0.5])
    """Weight of the log-probabilities of a response's verbose tokens, those beyond the length of the shorter response
    (LD-DPO, arXiv 2409.06411), in the policy and in the reference. For losses with a reference. null: 1."""
    use_weighting: bool = False
    """Weight each pair loss by how likely the policy is to write both responses (WPO, arXiv 2406.11827). The alignment
    and `nll_coefficient` keep their weights. orpo, whose loss holds a likelihood, refuses it."""
    alpha: NonNegativeFloat | None = Field(default=None, examples=[3])
    """Weight of the alignment. null: the paper's values, 3 for dpo and 1 for simpo and orpo; 1 for the losses that are
    not in the paper."""
    align: Literal["chosen", "both"] = "chosen"
    """Which responses are aligned between the short and the long context."""
    distance: Literal["l1", "l2", "huber"] = "l1"
    """Distance of the two rewards. l1: |gap|. l2: gap squared. huber: quadratic up to `huber_delta`, then linear."""
    huber_delta: PositiveFloat = 1.0
    """Gap where `distance: huber` becomes linear."""
    detach_short: bool = False
    """Stop the gradient of the alignment on the short side, so that it moves only the long reward."""
    token_alignment: Literal["reverse_kl"] | None = None
    """A term of solopo beside the alignment of rewards, per token of the chosen response (after OPSDL, arXiv
    2604.17535). reverse_kl: KL(behind the long context || behind the short one), over the vocabulary. The short side
    has no gradient. It needs `data.path`, not `data.sources`. null: none."""
    token_alignment_weight: NonNegativeFloat = 1.0
    """Weight of `token_alignment`, which is a mean over the tokens of the chosen response."""

    @field_validator("loss_type", mode="before")
    @classmethod
    def _accept_trls_name(cls, value: Any) -> Any:
        """TRL keeps a list of losses, mostly of one."""
        if isinstance(value, list):
            if len(value) != 1:
                raise UserError(
                    f"{value} is not one loss; name one of {', '.join(get_args(LossType))} "
                    "(TRL's `sft` beside it is nll_coefficient)"
                )
            (value,) = value
        return LOSS_ALIASES.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_label_smoothing(self) -> Self:
        smoothing, loss_type = self.label_smoothing, self.loss_type
        if loss_type not in _SMOOTHED:
            if smoothing != 0:
                raise UserError(
                    f"label_smoothing={smoothing} has no effect with loss_type={loss_type}; "
                    f"set it to 0, or loss_type to {', '.join(_SMOOTHED)}"
                )
            return self
        legal = _SMOOTHED[loss_type]
        above = smoothing > 0 or (smoothing == 0 and legal.startswith("["))
        below = smoothing < 0.5 or (smoothing == 0.5 and legal.endswith("]"))
        if not (above and below):
            raise UserError(f"label_smoothing={smoothing} is not in {legal}, which loss_type={loss_type} needs")
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.ld_alpha is not None and self.loss_type in _WITHOUT_REFERENCE:
            raise UserError(
                f"ld_alpha={self.ld_alpha} needs a loss_type with a reference; loss_type={self.loss_type} has none"
            )
        if self.use_weighting and self.loss_type == "orpo":
            raise UserError("use_weighting=true would also weight the likelihood in loss_type=orpo; set it to false")
        return self

    @model_validator(mode="after")
    def _check_beta(self) -> Self:
        if self.loss_type == "orpo" and self.beta != type(self).model_fields["beta"].default:
            raise UserError(
                f"beta={self.beta} has no effect with loss_type=orpo; set orpo_lambda, which TRL calls beta"
            )
        return self

    @property
    def roles(self) -> Roles:
        """The sequences of a triplet that this objective reads."""
        if self.name == "long_po":
            return Roles((Role.LONG_CHOSEN, Role.LONG_REJECTED))
        if self.name == "sft":
            return Roles((Role.SHORT_CHOSEN,))
        pair = (Role.SHORT_CHOSEN, Role.SHORT_REJECTED)
        if self.name == "short_po":
            return Roles(pair)
        both = self.align == "both"
        return Roles(pair, (Role.LONG_CHOSEN, Role.LONG_REJECTED) if both else (Role.LONG_CHOSEN,))

    @property
    def alignment_weight(self) -> float:
        """`alpha`, or the paper's value for this loss if `alpha` is null."""
        return _PAPER_ALPHA.get(self.loss_type, 1.0) if self.alpha is None else self.alpha

    @property
    def aligns_tokens(self) -> bool:
        """Whether the model behind the long context is compared with itself behind the short one, at each token."""
        return self.name == "solopo" and self.token_alignment is not None

    @property
    def needs_reference(self) -> bool:
        """Whether the reward compares the policy with a reference model."""
        return self.name != "sft" and self.loss_type not in _WITHOUT_REFERENCE


class LogprobConfig(Section):
    """The output layer, which computes the log-probabilities of the responses alone."""

    chunk_tokens: PositiveInt = 1024
    """Most response tokens whose logits exist at the same time."""


class ReferenceConfig(Section):
    """The frozen model that rewards are compared with."""

    model_path: _Path | None = None
    """Hugging Face directory or Megatron checkpoint. null: the initial weights of the policy."""
    cache: _Path | None = None
    """Directory of the stored log-probabilities. null: `<run_dir>/reference`."""
    context: Literal["short"] | None = None
    """short: the reference reads every response behind the short context, also where the policy reads it behind the
    long one (LongPO, arXiv 2502.13922). null: behind the policy's own context."""


class OptimizerConfig(Section):
    """Adam and its schedule, with Megatron-Core's names."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_iters: NonNegativeInt = 0
    """Steps until the learning rate reaches `lr`."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay from `lr` to `min_lr`."""
    lr_decay_iters: PositiveInt | None = Field(default=None, examples=[1000])
    """Steps until the learning rate has fallen to `min_lr`, where it stays. null: the length of the run. A run that
    continues with another length needs this key."""
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: _Decay = 0.9
    adam_beta2: _Decay = 0.95
    adam_eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0
    """Largest norm of the gradient; a longer gradient is scaled down to it. 0: no clipping."""
    use_distributed_optimizer: bool = True
    """Divide the optimizer's state among the data-parallel and context-parallel ranks."""
    optimizer_offload_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the parameters whose float32 weights, moments and update are on the host (Megatron's hybrid optimizer,
    `optimizer_cpu_offload`). Each such parameter takes 16 bytes of host memory, 4 of them pinned, instead of 12 bytes
    on the GPU."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in float32. false: in the model's precision, which halves their memory."""

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.optimizer_offload_fraction and not self.use_distributed_optimizer:
            raise UserError(
                f"optimizer_offload_fraction={self.optimizer_offload_fraction} needs use_distributed_optimizer=true"
            )
        return self


class CheckpointConfig(Section):
    """Megatron distributed checkpoints in `<run_dir>/checkpoints`."""

    save_steps: PositiveInt | None = Field(default=None, examples=[100])
    """Save every this many steps. null: the clock alone decides (`every_minutes`). The run is saved at its end too."""
    every_minutes: PositiveFloat | None = 60.0
    """Save also when this many minutes have passed since the last save began, by the clock of rank 0. null: never."""
    must_save_by: str | None = Field(default=None, examples=["2030-01-31T18:00"])
    """Save also before this moment, and continue. An ISO time such as 2030-01-31T18:00 (local unless it names a zone),
    or `slurm` for the end of the job's time limit. The run leaves twice the time of its slowest step and save, and five
    minutes until it has seen both."""
    async_save: bool = False
    """Continue to train while threads write a copy of the state. The run keeps host memory for what a rank writes.
    `latest` changes when all ranks have written."""
    keep_last: PositiveInt | None = 3
    """How many of the newest checkpoints stay. null: all. A new checkpoint is complete before an old one is removed, so
    that the disk needs room for one more. If the disk is full, a warning is printed and the run goes on, as long as it
    has an older checkpoint. The run ends if its last save fails."""
    keep_every: PositiveInt | None = Field(default=None, examples=[1000])
    """Checkpoints of steps that are multiples of this stay too."""
    best_metric: str | None = None
    """A metric of `metrics.jsonl`, such as eval_loss. `checkpoints/best` names the checkpoint whose step has the lowest
    value, and that checkpoint stays too."""
    greater_is_better: bool = False
    """`checkpoints/best` names the checkpoint with the greatest `best_metric` instead."""
    resume: bool = True
    """Continue from the newest complete checkpoint in `<run_dir>/checkpoints`, if there is one. false: refuse a
    directory that holds a run."""
    verify: Literal["checksums", "sizes"] = "checksums"
    """How a checkpoint is checked before it is loaded. checksums: the ranks read every file, each its share. sizes:
    find only missing and shortened files, without reading them."""

    @field_validator("must_save_by")
    @classmethod
    def _check_moment(cls, value: str | None) -> str | None:
        try:
            if value not in (None, "slurm"):
                datetime.fromisoformat(value)
        except ValueError:
            raise UserError(f"{value!r} is neither an ISO time, such as 2030-01-31T18:00, nor slurm") from None
        return value

    @model_validator(mode="after")
    def _check_what_stays(self) -> Self:
        if self.keep_every is not None and self.keep_last is None:
            raise UserError(f"keep_every={self.keep_every} has no effect without keep_last: all checkpoints stay")
        if self.greater_is_better and self.best_metric is None:
            raise UserError("greater_is_better=true has no effect without best_metric")
        return self


class WatchdogConfig(Section):
    """How long a rank may make no progress. After that it writes its stacks, names the missing ranks and exits with 86.

    All limits are in minutes.
    """

    timeout_minutes: PositiveFloat = 10.0
    """Limit of a micro-batch of a step, an evaluation or a reference pass, and of an optimizer update."""
    start_timeout_minutes: PositiveFloat = 30.0
    """Limit of the first of each of these, when weights are read, kernels compiled and ranks connected."""
    save_timeout_minutes: PositiveFloat = 30.0
    """Limit of a save."""


class LoggingConfig(Section):
    """Where metrics go, in addition to `metrics.jsonl`, which holds every step."""

    console_steps: PositiveInt = 1
    """Print a line every this many steps. Skipped steps, evaluations and the last step have a line in any case."""
    tensorboard: bool = True
    """Write TensorBoard's files to `<run_dir>/tensorboard`."""
    wandb_project: str | None = None
    """Send the metrics to this project of Weights & Biases. null: do not."""


class ProfileConfig(Section):
    """Profiles of a few steps, written to `<run_dir>/profile`."""

    steps: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = Field(
        default=None, examples=[[10, 12]]
    )
    """First and last step to profile, such as [10, 12]. null: none. Each rank writes a trace (`trace.json.gz`, for
    Perfetto), and on a GPU a snapshot of its memory (`memory.pickle`)."""
    ranks: list[NonNegativeInt] = Field(default=[0], min_length=1)
    """The ranks that are profiled. They are slower meanwhile, and the others wait for them."""

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise UserError(f"steps={self.steps}: the first step comes after the last; for example [10,12]")
        return self


class Config(Section):
    """One run."""

    run_dir: _Path
    """Directory of everything that the run writes."""
    seed: NonNegativeInt = 1234
    """Seed of the order of the data and of all random numbers."""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    moe: MoEConfig = MoEConfig()
    lora: LoRAConfig | None = Field(default=None, examples=[{"rank": 16}])
    """null: train the whole model."""
    objective: ObjectiveConfig = ObjectiveConfig()
    logprob: LogprobConfig = LogprobConfig()
    reference: ReferenceConfig = ReferenceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="after")
    def _check_distributed_optimizer(self) -> Self:
        if self.optimizer.use_distributed_optimizer:
            return self
        if self.parallel.overlap_param_gather:
            raise UserError("parallel.overlap_param_gather=true needs optimizer.use_distributed_optimizer=true")
        instances = self.parallel.num_distributed_optimizer_instances
        if instances > 1:
            raise UserError(
                f"parallel.num_distributed_optimizer_instances={instances} needs "
                "optimizer.use_distributed_optimizer=true"
            )
        return self

    @model_validator(mode="after")
    def _check_mixture(self) -> Self:
        if self.data.sources is not None and self.objective.token_alignment is not None:
            raise UserError(
                f"objective.token_alignment={self.objective.token_alignment} works with data.path alone; set it or "
                "data.sources to null"
            )
        return self

    @property
    def sources(self) -> tuple["Source", ...]:
        """What the run reads: `data.path` alone, without a name, or each of `data.sources`."""
        if self.data.sources is None:
            return (Source("", 1.0, self),)
        return tuple(Source(each.known_as, each.weight, self._of_source(each)) for each in self.data.sources)

    def _of_source(self, source: SourceConfig) -> "Config":
        objective = {"name": source.objective or self.objective.name}
        update = {
            "data": self.data.model_copy(update={"path": source.path, "sources": None}),
            "objective": self.objective.model_copy(update=objective),
            "reference": self.reference.model_copy(update={"cache": self.reference_cache / source.known_as}),
        }
        return self.model_copy(update=update)

    @property
    def needs_reference(self) -> bool:
        """Whether the rewards of some rows compare the policy with a reference model."""
        return any(source.config.objective.needs_reference for source in self.sources)

    @property
    def has_shared_packs(self) -> bool:
        """Whether packs can hold responses that share their prompt."""
        return any(self._shares_prompts)

    @property
    def has_unshared_packs(self) -> bool:
        """Whether packs can hold no response that shares its prompt, such as packs of one response per row."""
        return not all(self._shares_prompts)

    @property
    def _shares_prompts(self) -> list[bool]:
        """Of each source, whether responses of a row share their prompt."""
        all_roles = [source.config.objective.roles.all for source in self.sources]
        return [len(prompt_groups(roles, self.data.share_prompts)) < len(roles) for roles in all_roles]

    @property
    def reference_cache(self) -> Path:
        """Directory of the reference's stored log-probabilities."""
        return self.reference.cache or self.run_dir / "reference"

    def reference_role(self, role: Role) -> Role:
        """The sequence whose reference log-probability belongs to the policy's sequence `role`."""
        return role if self.reference.context is None else role.on_short_context

    @property
    def reference_roles(self) -> tuple[Role, ...]:
        """The sequences of a triplet that the reference model reads."""
        return tuple(dict.fromkeys(map(self.reference_role, self.objective.roles.all)))

    @property
    def contexts_read(self) -> set[Context]:
        """The contexts that the policy reads, and those of its reference if the objective needs one."""
        references = self.reference_roles if self.objective.needs_reference else ()
        return {role.context for role in self.objective.roles.all + references}


@dataclass(frozen=True)
class Source:
    """One set of rows of a run."""

    name: str
    """"" for `data.path`."""
    weight: float
    config: Config
    """The run as if it read only this source, with its `data.path`, `objective.name` and `reference.cache`."""

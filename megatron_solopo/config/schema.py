"""What all sections of the configuration have in common.

The section `checkpoint` of the configuration.

The configuration of a run: sections, keys, types, defaults and legal values, checked by pydantic.

Parallelism and optimizer keys bear Megatron-Core's names, preference keys TRL's. `config_file`
reads and writes it.

The sequences of a triplet, by name.

A role is the context that a response is read in and the response that the sequence ends with: `short_chosen`.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

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


class Section(BaseModel):
    """Frozen, and strict about types and keys; a string below a key is its documentation."""

    # Strict: `true` is no number and 1.5 no integer.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class CheckpointConfig(Section):
    """Megatron distributed checkpoints under `<run_dir>/checkpoints`."""

    save_steps: PositiveInt | None = None
    """Save every this many steps, and at the end; null: only at the end."""
    every_minutes: PositiveFloat | None = None
    """Save where this much time has passed since the last save, too."""
    must_save_by: str | None = None
    """Save in time before this moment, too, and go on: an ISO time (2030-01-31T18:00, local unless it says otherwise),
    or `slurm` for the end of the job's time limit. The slowest step and save so far, twice, are left for it; five
    minutes until both were seen."""
    async_save: bool = False
    """Train on while threads write a copy of the state: host memory for this rank's share. `latest` follows when all
    ranks have written; a failure ends the run at the next step."""
    keep_last: PositiveInt | None = None
    """Checkpoints that stay, the newest ones; null: all. A new one is complete before an old one goes."""
    keep_every: PositiveInt | None = None
    """Those of steps that are multiples of this stay besides."""
    best_metric: str | None = None
    """A metric of `metrics.jsonl`, such as eval_loss: of the saved steps that have it, `checkpoints/best` names the one
    with the lowest, and that checkpoint stays besides."""
    greater_is_better: bool = False
    """`checkpoints/best` names the one with the greatest `best_metric` instead."""
    resume: bool = True
    """Continue from the newest whole checkpoint in `<run_dir>/checkpoints`, where there is one; false: refuse a
    directory that holds a run."""
    verify: Literal["checksums", "sizes"] = "checksums"
    """What a checkpoint is held against before it is loaded. checksums: the ranks read every file, each its share, at
    what the disk gives; sizes: finds missing and cut files alone, in a moment."""

    @field_validator("must_save_by")
    @classmethod
    def _is_a_moment(cls, value: str | None) -> str | None:
        try:
            if value not in (None, "slurm"):
                datetime.fromisoformat(value)
        except ValueError:
            raise UserError(f"{value!r} is neither an ISO time, as 2030-01-31T18:00, nor slurm") from None
        return value

    @model_validator(mode="after")
    def _what_is_kept_besides_needs_a_limit(self) -> Self:
        if self.keep_every is not None and self.keep_last is None:
            raise UserError(f"keep_every={self.keep_every} has no part without keep_last: all checkpoints stay")
        if self.greater_is_better and self.best_metric is None:
            raise UserError("greater_is_better=true has no part without best_metric")
        return self


LossType = Literal["dpo", "simpo", "orpo", "ipo", "cpo", "hinge", "robust"]
ObjectiveName = Literal["solopo", "short_po", "long_po"]
FP8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]

_Path = Annotated[Path, Strict(False)]  # written as a string
_Decay = Annotated[float, Field(ge=0, lt=1)]

_PAPER_ALPHA = {"dpo": 3.0}


class ModelConfig(Section):
    """What is trained."""

    path: _Path
    """Hugging Face directory (config.json, safetensors weights, tokenizer), or a Megatron checkpoint that `convert
    import` or a run of `train` wrote."""
    implementation: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer kernels: Transformer Engine where it and CUDA are (auto), or plain PyTorch (local)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute precision. bfloat16 keeps float32 master weights in the optimizer."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """FP8 matrix products in the transformer layers, through Transformer Engine; null: none. hybrid takes e5m2 for
    gradients. Attention and the output layer stay in bfloat16."""
    fp8_recipe: FP8Recipe = "blockwise"
    """How FP8 values are scaled. blockwise: per 128 values of one token, so that a sequence does not depend on what
    it is packed with; tensorwise and delayed: per tensor, over the whole pack; mxfp8: per 32 values (Blackwell)."""
    fp8_param: bool = False
    """Keeps the layers' weights themselves in FP8: half the memory, and half the data-parallel gather. Checkpoints and
    exports then hold those FP8 values; the exact master weights are in the optimizer's state."""
    first_last_layers_bf16: bool = False
    """Runs the first and last layers in bfloat16 where `fp8` is set."""
    num_layers_at_start_in_bf16: NonNegativeInt = 1
    num_layers_at_end_in_bf16: NonNegativeInt = 1

    @property
    def has_delayed_scales(self) -> bool:
        """Whether FP8 values are scaled by what earlier forward passes saw, so that none goes without a trace."""
        return self.fp8 is not None and self.fp8_recipe == "delayed"


class DataConfig(Section):
    """Which triplets, and how they are packed."""

    path: _Path
    """Directory written by `megatron-solopo data prepare`."""
    max_tokens_per_pack: PositiveInt
    """Token budget of one pack (micro-batch), counted after the per-sequence padding and before it is cut for CP."""
    max_triplets_per_pack: PositiveInt | None = None
    """Upper bound on the triplets of one pack; 1 turns packing off."""


class ParallelConfig(Section):
    """Megatron-Core's parallel sizes; what remains of the world size is data parallel."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: Annotated[int, Field(ge=2)] | None = None
    """Model chunks per pipeline rank (interleaved schedule); null: one, and the plain schedule."""
    context_parallel_size: PositiveInt = 1
    sequence_parallel: bool | None = None
    """Shards activations outside attention over the tensor-parallel ranks; null: on when TP > 1."""
    cp_comm_type: Literal["p2p", "a2a"] = "p2p"
    """How context-parallel ranks exchange keys and values in Transformer Engine's attention: in a ring (p2p), or by
    heads (a2a), which needs the heads of a tensor-parallel rank to divide by CP."""
    distributed_timeout_minutes: PositiveFloat = 60.0
    """After this long a collective fails (gloo) or ends the process (NCCL). The net below `watchdog`, whose limits
    should be shorter: it says who is missing."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Computes activations again in the backward pass: whole layers (full), or `recompute_modules` of each."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_num_layers: PositiveInt = 1
    recompute_modules: list[Literal["core_attn", "mlp"]] = Field(default=["core_attn"])
    """What `recompute_granularity: selective` computes again."""
    cpu_offloading_num_layers: NonNegativeInt = 0
    """Layers whose activations wait in host memory for the backward pass; needs a GPU and Transformer Engine."""

    @property
    def uses_sequence_parallel(self) -> bool:
        """Whether activations are sharded over the tensor-parallel ranks."""
        return self.tensor_model_parallel_size > 1 if self.sequence_parallel is None else self.sequence_parallel

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share one replica: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


Context = Literal["short", "long"]
Response = Literal["chosen", "rejected"]


class Role(StrEnum):
    """One sequence of a triplet: the context that the model reads, and the response behind it."""

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
        """The same response behind the short context."""
        return Role(f"short_{self.response}")


@dataclass(frozen=True)
class Roles:
    """The sequences of a triplet that an objective reads."""

    pair: tuple[Role, Role]
    """The chosen and the rejected sequence that the preference loss compares."""
    aligned: tuple[Role, ...] = ()
    """The long sequences whose reward is aligned to the reward on the short context."""

    @property
    def all(self) -> tuple[Role, ...]:
        """The pair, then the aligned sequences. Packs and caches of the reference keep this order."""
        return self.pair + self.aligned


class ObjectiveConfig(Section):
    """The loss; every formula is in `megatron_solopo.objective`."""

    name: ObjectiveName = "solopo"
    """solopo: pair loss on the short context plus reward alignment to the long one; short_po and
    long_po: the plain pair loss on one of the contexts (long_po is the usual method)."""
    loss_type: LossType = "dpo"
    beta: PositiveFloat = 0.1
    """Scale of the reward."""
    gamma: NonNegativeFloat = 0.5
    """Target margin of SimPO (TRL's `simpo_gamma`)."""
    orpo_lambda: NonNegativeFloat = 1.0
    """Weight of ORPO's odds-ratio term."""
    label_smoothing: float = 0.0
    """Probability that a preference label is wrong: in [0, 0.5] for dpo (cDPO), in [0, 0.5) for robust; else 0."""
    nll_coefficient: NonNegativeFloat = 0.0
    """Weight of an added negative log-likelihood per token of the chosen answer."""
    alpha: NonNegativeFloat | None = None
    """Weight of the reward alignment; null: the paper's, 3 for dpo and 1 for simpo and
    orpo, and 1 for the others, which the paper does not treat."""
    align: Literal["chosen", "both"] = "chosen"
    """Which answers are aligned between the short and the long context."""
    distance: Literal["l1", "l2", "huber"] = "l1"
    """l1: |gap|; l2: gap squared; huber: quadratic up to `huber_delta`, then linear."""
    huber_delta: PositiveFloat = 1.0
    detach_short: bool = False
    """Stops the alignment's gradient on the short side, so that only the long reward moves."""

    @model_validator(mode="after")
    def _label_smoothing_fits_the_loss(self) -> Self:
        smoothing, loss_type = self.label_smoothing, self.loss_type
        if loss_type not in ("dpo", "robust"):
            if smoothing != 0:
                raise UserError(
                    f"label_smoothing={smoothing} has no part in loss_type={loss_type}; "
                    "set it to 0, or loss_type to dpo or robust"
                )
        elif not 0 <= smoothing <= 0.5 or (loss_type == "robust" and smoothing == 0.5):
            legal = "[0, 0.5]" if loss_type == "dpo" else "[0, 0.5)"
            raise UserError(f"label_smoothing={smoothing} is not in {legal}, legal for loss_type={loss_type}")
        return self

    @model_validator(mode="after")
    def _beta_is_not_orpos_lambda(self) -> Self:
        if self.loss_type == "orpo" and self.beta != type(self).model_fields["beta"].default:
            raise UserError(f"beta={self.beta} has no part in loss_type=orpo; TRL's beta for ORPO is orpo_lambda here")
        return self

    @property
    def roles(self) -> Roles:
        """The sequences of a triplet that this objective reads."""
        if self.name == "long_po":
            return Roles((Role.LONG_CHOSEN, Role.LONG_REJECTED))
        pair = (Role.SHORT_CHOSEN, Role.SHORT_REJECTED)
        if self.name == "short_po":
            return Roles(pair)
        both = self.align == "both"
        return Roles(pair, (Role.LONG_CHOSEN, Role.LONG_REJECTED) if both else (Role.LONG_CHOSEN,))

    @property
    def alignment_weight(self) -> float:
        """`alpha`, or the paper's value for this loss type where it is not set."""
        return _PAPER_ALPHA.get(self.loss_type, 1.0) if self.alpha is None else self.alpha

    @property
    def needs_reference(self) -> bool:
        """Whether the reward is measured against a reference model."""
        return self.loss_type in ("dpo", "ipo", "hinge", "robust")


class LogprobConfig(Section):
    """The response-only head."""

    chunk_tokens: PositiveInt = 1024
    """Response rows projected to the vocabulary at a time; logits never exceed this many rows."""


class ReferenceConfig(Section):
    """The frozen model that rewards are measured against."""

    model_path: _Path | None = None
    """Hugging Face directory or Megatron checkpoint; null: the policy's initial weights."""
    cache: _Path | None = None
    """Directory of the cached log-probs; null: `<run_dir>/reference`."""


class OptimizerConfig(Section):
    """Adam and its schedule, in Megatron-Core's names."""

    lr: PositiveFloat = 1e-6
    min_lr: NonNegativeFloat = 0.0
    lr_warmup_iters: NonNegativeInt = 0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: _Decay = 0.9
    adam_beta2: _Decay = 0.95
    adam_eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0
    """Upper bound of the gradient norm; 0 turns clipping off."""
    use_distributed_optimizer: bool = True
    """Shards the optimizer state over the data-parallel (and context-parallel) ranks."""
    optimizer_offload_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the parameters whose float32 weights, moments and update live in host memory (Megatron's hybrid
    optimizer, `optimizer_cpu_offload`): 16 bytes of host memory each, 4 of them pinned, instead of 12 on the GPU."""
    grad_reduce_in_fp32: bool = True
    """Accumulates and reduces gradients in float32; false: in the model's precision, with half the memory."""

    @model_validator(mode="after")
    def _offload_is_of_the_distributed_optimizer(self) -> Self:
        if self.optimizer_offload_fraction and not self.use_distributed_optimizer:
            raise UserError(
                f"optimizer_offload_fraction={self.optimizer_offload_fraction} needs use_distributed_optimizer=true"
            )
        return self


class TrainingConfig(Section):
    """Length, batch and what happens between steps."""

    global_batch_size: PositiveInt
    """Triplets per optimizer step, over all ranks."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; null: `num_train_epochs` decides."""
    num_train_epochs: PositiveFloat = 1.0
    eval_steps: PositiveInt | None = None
    """Evaluate on the held-out split every this many steps, and at the end; null: never."""
    try_largest_pack: bool | None = None
    """Try forward and backward of the largest pack before the first step, so that too little memory shows at once;
    null: where there is a GPU. It takes about as long as that pack does in a step, once per pipeline stage."""
    max_skipped_steps_in_a_row: PositiveInt = 10
    """A step whose loss or gradient is NaN or infinite updates nothing and is skipped; after this many, one after the
    other, the run ends with an error and the checkpoint from before the first of them."""


class WatchdogConfig(Section):
    """How long a rank may stand still before it writes its stacks, names who did not arrive, and ends with code 86."""

    timeout_minutes: PositiveFloat = 10.0
    """Within one micro-batch, optimizer update, or batch of an evaluation or a reference pass."""
    start_timeout_minutes: PositiveFloat = 30.0
    """Where each of these comes for the first time (weights are read, kernels compiled, ranks connected)."""
    save_timeout_minutes: PositiveFloat = 30.0
    """Within a save."""


class LoggingConfig(Section):
    """Where metrics go besides `metrics.jsonl` and the console."""

    tensorboard: bool = True
    wandb_project: str | None = None


class Config(Section):
    """One run."""

    run_dir: _Path
    """Everything the run writes."""
    seed: NonNegativeInt = 1234
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    logprob: LogprobConfig = LogprobConfig()
    reference: ReferenceConfig = ReferenceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def reference_cache(self) -> Path:
        """Where the reference log-probs are kept."""
        return self.reference.cache or self.run_dir / "reference"

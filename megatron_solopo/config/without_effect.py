"""Keys that a configuration sets and that change nothing in its run.

Such a key is a warning and no error. A config that compares losses, dtypes or layouts by overrides may keep them all.
Keys that contradict each other are refused elsewhere: in the schema, and where the model or the machine is known.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_solopo.config.load import as_override, dotted
from megatron_solopo.config.schema import Config, ParallelConfig

_TOKENS = ("token_alignment", "token_alignment_weight")
_Cause = tuple[str, tuple[str, ...]]
"""Why, and the keys that then change nothing."""

_OF_REFERENCE = ("reference.model_path", "reference.cache", "reference.context")


@dataclass(frozen=True)
class Surroundings:
    """Where a run takes place."""

    world_size: int
    sharing_ranks: int
    """DP x CP, the ranks that share a gradient."""
    uses_transformer_engine: bool


def warning_without_effect(config: Config, surroundings: Surroundings | None) -> str | None:
    """One line that names every key that differs from its default and changes nothing, and why; None if there is none.

    Args:
        surroundings: None: not known yet. Then keys whose effect depends on them are not named.
    """
    values = dict(dotted(config.model_dump(mode="json")))
    defaults = dict(dotted(_with_defaults(config).model_dump(mode="json")))
    causes = [*_causes_in_all_sources(config), *_run_causes(config), *_parallel_causes(config.parallel)]
    if surroundings is not None:
        causes += _surrounding_causes(config, surroundings)
    found: dict[str, str] = {}
    for why, keys in causes:
        for key in keys:
            if values[key] != defaults[key]:
                found.setdefault(key, f"{key}={as_override(values[key])} ({why})")
    return f"warning: no effect in this run: {', '.join(found.values())}" if found else None


def _with_defaults(config: Config) -> Config:
    """The configuration with nothing set but what has no default."""
    required = {
        name: {key: getattr(section, key) for key, field in type(section).model_fields.items() if field.is_required()}
        for name, section in (("model", config.model), ("data", config.data), ("training", config.training))
    }
    required["data"] |= {"path": config.data.path, "sources": config.data.sources}
    return Config.model_validate({"run_dir": config.run_dir, **required})


def _causes_in_all_sources(config: Config) -> Iterator[_Cause]:
    """What changes nothing for any row. The cause is that of the first source."""
    first, *others = [list(_objective_causes(source.config)) for source in config.sources]
    for why, keys in first:
        idle = (key for key in keys if all(any(key in more for _, more in causes) for causes in others))
        yield why, tuple(idle)
    if config.data.sources is not None and all(source.objective for source in config.data.sources):
        yield "every one of data.sources has its own objective", ("objective.name",)


def _objective_causes(config: Config) -> Iterator[_Cause]:
    objective = config.objective
    name, loss_type = objective.name, objective.loss_type
    if name != "solopo":
        keys = ("alpha", "align", "distance", "huber_delta", "detach_short", *_TOKENS)
        yield f"objective.name={name} aligns nothing", (*(f"objective.{key}" for key in keys), "moe.replay")
    if name == "sft":
        idle = (
            "loss_type",
            "beta",
            "gamma",
            "orpo_lambda",
            "label_smoothing",
            "nll_coefficient",
            "ld_alpha",
            "use_weighting",
        )
        yield "objective.name=sft compares no responses", tuple(f"objective.{key}" for key in idle)
        yield "objective.name=sft has no reference", _OF_REFERENCE
        return
    if objective.token_alignment is None:
        yield "objective.token_alignment=null", ("objective.token_alignment_weight",)
    if objective.distance != "huber":
        yield f"objective.distance={objective.distance}", ("objective.huber_delta",)
    if loss_type != "simpo":
        yield f"objective.loss_type={loss_type}", ("objective.gamma",)
    if loss_type != "orpo":
        yield f"objective.loss_type={loss_type}", ("objective.orpo_lambda",)
    if not objective.needs_reference:
        yield f"objective.loss_type={loss_type} has no reference", _OF_REFERENCE
    if config.reference_roles == objective.roles.all:
        yield f"objective.name={name} reads no long context", ("reference.context",)


def _run_causes(config: Config) -> Iterator[_Cause]:
    model, optimizer, training = config.model, config.optimizer, config.training
    if model.fp8 is None:
        yield "model.fp8=null", ("model.fp8_recipe",)
    if not model.first_last_layers_bf16:
        keys = ("model.num_layers_at_start_in_bf16", "model.num_layers_at_end_in_bf16")
        yield "model.first_last_layers_bf16=false", keys
    if model.dtype == "float32":
        yield "model.dtype=float32", ("optimizer.grad_reduce_in_fp32",)
    if training.max_steps is not None:
        yield f"training.max_steps={training.max_steps} decides", ("training.num_train_epochs",)
    if training.manual_gc is False:
        yield "training.manual_gc=false", ("training.manual_gc_interval",)
    if optimizer.lr_decay_style == "constant":
        yield "optimizer.lr_decay_style=constant", ("optimizer.min_lr", "optimizer.lr_decay_iters")
    if config.profile.steps is None:
        yield "profile.steps=null", ("profile.ranks",)


def _parallel_causes(parallel: ParallelConfig) -> Iterator[_Cause]:
    recomputed = parallel.recompute_granularity
    why = f"parallel.recompute_granularity={recomputed or 'null'}"
    if recomputed != "full":
        yield why, ("parallel.recompute_method", "parallel.recompute_num_layers")
    if recomputed != "selective":
        yield why, ("parallel.recompute_modules",)


def _surrounding_causes(config: Config, surroundings: Surroundings) -> Iterator[_Cause]:
    cp = config.parallel.context_parallel_size
    exchange = ("parallel.cp_comm_type", "parallel.hierarchical_context_parallel_sizes")
    if cp == 1:
        yield "parallel.context_parallel_size=1", ("parallel.cp_comm_type",)
    if not surroundings.uses_transformer_engine:
        yield "plain PyTorch's attention gathers keys and values", exchange
    elif cp > 1 and not config.has_unshared_packs:
        yield "data.share_prompts=true: attention gathers keys and values", exchange
    if surroundings.sharing_ranks == 1:
        keys = ("parallel.overlap_grad_reduce", "parallel.overlap_param_gather")
        yield "one rank has each gradient: DP x CP is 1", keys
    if surroundings.world_size == 1 and config.training.manual_gc is None:
        yield "one process and training.manual_gc=null", ("training.manual_gc_interval",)

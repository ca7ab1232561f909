"""A short training run in one precision, and how two of them differ; the measurements behind `fp8_acceptance.py`."""
# ruff: noqa: E402  (megatron's warnings of what is not installed must be off before it is imported)

import gc
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

warnings.filterwarnings("ignore", module=r"megatron\.core")

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_solopo.config import Config, ObjectiveConfig, Role
from megatron_solopo.data.loader import GlobalBatchLoader, LoaderSource
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.objective import metric_names
from megatron_solopo.objective.preference import PREFERENCE_LOSSES, ResponseLogprobs
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.metrics import reduce_sums
from megatron_solopo.train.policy import Policy, build_policy, load_frozen
from megatron_solopo.train.run_data import RunDatasets, training_batches
from megatron_solopo.train.scoring import score_sequences
from megatron_solopo.train.step import ReferenceLogprobs, objective_loss, run_schedule

GAP = "solo_ra/gap_abs"


@dataclass
class PrecisionRun:
    """What one precision made of the same weights and triplets. Shapes: T triplets, R roles."""

    logps_TR: Tensor
    """Sequence log-probs before the first step."""
    losses: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Mean |reward gap| of each step; empty where the objective has none."""
    grad_norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    """On the host, see `first_gradient`: this rank's, each parameter of the whole model on one rank alone."""


def _batches(config: Config, datasets: RunDatasets, topology: Topology) -> GlobalBatchLoader:
    source = LoaderSource(datasets.by_split["train"], config.objective.roles.all)
    return training_batches(config, [source], topology)


def run_precision(config: Config, datasets: RunDatasets, topology: Topology, steps: int) -> PrecisionRun:
    """Score the training split, then train on it; the caller's groups, this config's precision."""
    policy = build_policy(config, resolve_model(config.model, config.parallel), topology, steps)
    start = score_sequences(config, policy.chunks, datasets.by_split["train"], topology, "policy")
    run = PrecisionRun(start.logps)
    references = _references(config, datasets, topology, start)
    run.gradients = first_gradient(config, policy, datasets, topology, references)
    loss = objective_loss(config.objective, references, topology)
    loader = _batches(config, datasets, topology)
    names = metric_names(config.objective)
    for step in range(steps):
        batch = loader.next_batch()
        if step == 0 and config.model.has_delayed_scales:
            policy.warm_scales(batch.packs, loss, topology)
        started = time.monotonic()
        result = policy.step(batch.packs, loss, topology)
        run.grad_norms.append(result.grad_norm)
        run.seconds.append(time.monotonic() - started)
        sums = dict(zip(names, reduce_sums(result.reports, len(names), topology), strict=True))
        run.losses.append(sums["loss"] / batch.num_triplets)
        if GAP in sums:
            run.gaps.append(sums[GAP] / batch.num_triplets)
    del policy, loss
    _free()
    return run


def _references(
    config: Config, datasets: RunDatasets, topology: Topology, policy_start: ReferenceLogprobs
) -> ReferenceLogprobs | None:
    """Each precision measures its rewards against a reference of its own, as a whole run would."""
    if not config.objective.needs_reference:
        return None
    if config.reference.model_path is None:
        return policy_start
    model = resolve_model(config.model, config.parallel).at(config.reference.model_path)
    chunks = load_frozen(model, topology, chunk_tokens=config.logprob.chunk_tokens, moe=config.moe)
    return score_sequences(config, chunks, datasets.by_split["train"], topology, "reference")


def _free() -> None:
    """The next precision's model needs this one's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_gradient(
    config: Config, policy: Policy, datasets: RunDatasets, topology: Topology, references: ReferenceLogprobs | None
) -> list[Tensor]:
    """Gradient of the first global batch, of the parameters that count on this rank, in a fixed order.

    Taken at a reward gap of known sign: where the policy is its own reference the gap starts at 0, on the kink of
    |gap|, and rounding would decide the sign of the gradient that is to be compared.
    """
    if references is not None:
        shift_R = torch.tensor([float(role.context == "long") for role in references.roles])
        references = ReferenceLogprobs(references.roles, references.logps - shift_R)
    packs = _batches(config, datasets, topology).next_batch().packs
    loss = objective_loss(config.objective, references, topology)
    if config.model.has_delayed_scales:
        policy.warm_scales(packs, loss, topology)
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    run_schedule(policy.chunks, packs, loss, topology, forward_only=False)
    return [
        parameter.main_grad.detach().to("cpu", torch.float32, copy=True)
        for chunk in policy.chunks
        for parameter in chunk.parameters()
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
    ]


def gradient_cosine(one: Sequence[Tensor], other: Sequence[Tensor], device: torch.device) -> float:
    """Cosine between two whole gradients, over all ranks."""
    pairs = list(zip(one, other, strict=True))
    sums = [
        sum(float(torch.sum(a.double() * b.double())) for a, b in each)
        for each in (pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs])
    ]
    total = torch.tensor(sums, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    dot, one_square, other_square = total.tolist()
    return float(dot / math.sqrt(one_square * other_square))


def raw_gaps(objective: ObjectiveConfig, logps_TR: Tensor, lengths_TR: Tensor) -> Tensor:
    """Reward of the chosen answer on the short minus on the long context, `[T]`, before a reference is taken off.

    The policy and its reference have the same weights at the start: with the reference taken off, there is no gap yet
    that noise could be compared with.
    """
    roles = objective.roles.all
    reward = PREFERENCE_LOSSES[objective.loss_type].reward
    short, long = (
        reward(ResponseLogprobs(logps_TR[:, place], lengths_TR[:, place], torch.zeros(len(logps_TR))), objective.beta)
        for place in (roles.index(Role.SHORT_CHOSEN), roles.index(Role.LONG_CHOSEN))
    )
    return short - long


def root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())

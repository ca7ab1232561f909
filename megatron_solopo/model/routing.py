"""What the routers of a mixture of experts do with the tokens of a step: counted; balanced or replayed if asked for.

A router sees positions and no sequences. So a pack of a model with experts carries the places of its positions, and
each layer hands them to its router, also where the backward pass computes the layer again.

Padding counts nowhere. Losses are those of single sequences, so the packing, the layout, the number of ranks and shared
prompts change no loss. Metrics count a shared prompt once.

Shapes: t positions on this rank, which context and sequence parallelism divide; B blocks; S sequences; M = B + S runs,
see `Pack.runs_T`; N response tokens of the whole pack, counted or not; E experts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_solopo.config import MoEConfig
from megatron_solopo.data.packing import Pack
from megatron_solopo.model.layers import layers_and_routers
from megatron_solopo.parallel.megatron_internals import allow_replay, replayed

_BALANCE, _Z_LOSS = "moe/load_balancing_loss", "moe/z_loss"


@dataclass(frozen=True)
class TokenPlaces:
    """Where the positions of this rank lie in their pack. Tensors are int64 unless noted."""

    real_t: Tensor
    """bool: whether a position holds a token, not padding."""
    runs_t: Tensor
    """The run of each position."""
    blocks_S: Tensor
    """The block of each sequence, whose prompt is the run of the same number."""
    num_blocks: int
    """B"""
    lengths_S: Tensor
    """Tokens of each sequence, on all ranks together."""
    response_tokens: Tensor
    """Numbers in [0, N) of the response tokens that a position of this rank predicts."""
    response_positions: Tensor
    """The positions that predict them, on this rank."""
    num_responses: int
    """N."""
    pairs_2P: Tensor
    """Numbers in [0, N) of tokens of the same response, behind the short and behind the long context."""
    loss_scale_S: Tensor
    """float: what each sequence's loss counts: CP / sequences of its triplet. The gradient is divided by CP x triplets
    afterwards."""
    is_trained: bool
    """Whether the pack is one of a training step. Only those are counted."""
    counted: set[int] = field(default_factory=set)
    """Layers that have counted this pack. The backward pass may compute a layer again."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> "TokenPlaces":
        """The same with every tensor on another device, where `move` brings it."""
        tensors = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return TokenPlaces(**vars(self) | tensors)


def token_places(pack: Pack, positions_t: Tensor, context_size: int, *, is_trained: bool) -> TokenPlaces:
    """Find the places of some positions of a pack, on the host.

    Args:
        positions_t: positions in [0, T) of the pack, in the order in which this rank holds them.
        is_trained: whether the pack is one of a training step.
    """
    blocks_t = torch.searchsorted(pack.cu_seqlens_B1.long(), positions_t, right=True) - 1
    offsets_t = positions_t - pack.cu_seqlens_B1[blocks_t]
    local_of_T = torch.full((pack.padded_tokens,), -1)
    local_of_T[positions_t] = torch.arange(len(positions_t))
    local_N = local_of_T[pack.predictors_L]
    return TokenPlaces(
        real_t=offsets_t < pack.block_lengths_B[blocks_t],
        runs_t=pack.runs_T[positions_t],
        blocks_S=pack.blocks_S,
        num_blocks=len(pack.prompt_lengths_B),
        lengths_S=pack.sequence_lengths_S,
        response_tokens=(local_N >= 0).nonzero().squeeze(1),
        response_positions=local_N[local_N >= 0],
        num_responses=len(local_N),
        pairs_2P=_response_pairs(pack),
        loss_scale_S=torch.cat(
            [torch.full((group.num_sequences,), context_size / len(group.roles)) for group in pack.groups]
        ),
        is_trained=is_trained,
    )


def _response_pairs(pack: Pack) -> Tensor:
    """[2, P]: for each role with a long context whose short one is in the pack, the same tokens of both responses."""
    starts_S = pack.response_lengths_S.cumsum(0) - pack.response_lengths_S
    found = [torch.empty(2, 0, dtype=torch.int64)]
    begin = 0
    for group in pack.groups:
        for long, role in enumerate(group.roles):
            if role.context != "long" or role.on_short_context not in group.roles:
                continue
            short = group.roles.index(role.on_short_context)
            for first in range(begin, begin + group.num_sequences, len(group.roles)):
                tokens = torch.arange(int(pack.response_lengths_S[first + long]))
                found.append(torch.stack([starts_S[first + short] + tokens, starts_S[first + long] + tokens]))
        begin += group.num_sequences
    return torch.cat(found, dim=1)


class RouterWatch:
    """Watches the routers of this rank's model chunks while they are trained.

    Args:
        counts_routes: whether the caller asks for `metrics`, which cost an exchange per layer and training pack.
    """

    def __init__(self, chunks: Iterable[torch.nn.Module], config: MoEConfig, *, counts_routes: bool = True) -> None:
        self._config = config
        coefficients = {_BALANCE: config.aux_loss_coefficient, _Z_LOSS: config.z_loss_coefficient}
        self._coefficients = {name: value for name, value in coefficients.items() if value}
        self._counts_routes = counts_routes
        self._sums: dict[int, _LayerSums] = {}
        self._of_layer: dict[int, TokenPlaces | None] = {}
        for chunk in chunks:
            self.attach(chunk)

    def attach(self, chunk: torch.nn.Module) -> None:
        """Attach to the routers of a model chunk, for its life."""
        for layer, router in layers_and_routers(chunk):
            if self._config.replay:
                allow_replay(router)
            layer.register_forward_pre_hook(partial(self._enter, router.layer_number), with_kwargs=True)
            router.routing = partial(self._route, router, router.routing)

    def _enter(self, layer: int, module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        self._of_layer[layer] = getattr(keywords.get("packed_seq_params"), "places", None)

    def _route(
        self, router: TopKRouter, routing: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Megatron's routing of logits [t, 1, E]; returns probabilities and choices [t, E]."""
        places = self._of_layer.get(router.layer_number)
        if places is None:
            return routing(logits, **more)
        if self._config.replay and places.pairs_2P.shape[1]:
            with torch.no_grad():
                _, wanted = routing(logits, **more)
                experts_tK = _as_behind_short(wanted, places).to(torch.float32).topk(router.topk).indices
            with replayed(router, experts_tK):
                probabilities, chosen = routing(logits, **more)
        else:
            probabilities, chosen = routing(logits, **more)
            wanted = chosen
        logits_tE = logits.flatten(0, -2).float()
        if self._counts_routes and places.is_trained and router.layer_number not in places.counted:
            places.counted.add(router.layer_number)
            with torch.no_grad():
                self._sums_of(router, logits_tE).add(logits_tE, chosen, places)
        if self._coefficients and torch.is_grad_enabled():
            losses = self._losses(logits_tE, wanted, places)
            if self._counts_routes and places.is_trained:
                self._sums_of(router, logits_tE).add_losses(losses, places)
            loss = sum(coefficient * losses[name] for name, coefficient in self._coefficients.items())
            probabilities = _WithLoss.apply(probabilities, loss)  # type: ignore[no-untyped-call]
        return probabilities, chosen

    def _sums_of(self, router: TopKRouter, logits_tE: Tensor) -> "_LayerSums":
        return self._sums.setdefault(router.layer_number, _LayerSums.zeros(logits_tE))

    def _losses(self, logits_tE: Tensor, chosen_tE: Tensor, places: TokenPlaces) -> dict[str, Tensor]:
        """This rank's share of the losses of all sequences of the pack, one layer's, without their coefficients.

        Args:
            chosen_tE: the routers' own choices, also where others are replayed.
        """
        real_t, num_blocks = places.real_t, places.num_blocks
        lengths_S = places.lengths_S.float()
        weights_S = places.loss_scale_S / lengths_S
        # A choice of rows by `real_t` would make the host wait for their number.
        weights_t = real_t * _over_runs(weights_S, places)[places.runs_t]
        losses = {}
        if _Z_LOSS in self._coefficients:
            losses[_Z_LOSS] = (logits_tE.logsumexp(dim=1).square() * weights_t).sum()
        if _BALANCE in self._coefficients:
            counts_ME = logits_tE.new_zeros(num_blocks + len(lengths_S), logits_tE.shape[1])
            counts_ME.index_add_(0, places.runs_t, (chosen_tE & real_t[:, None]).to(logits_tE.dtype))
            _sum_over_shards(counts_ME)
            counts_SE = counts_ME[places.blocks_S] + counts_ME[num_blocks:]
            shares_tE = _over_runs(counts_SE * (weights_S / lengths_S)[:, None], places)[places.runs_t]
            balance_t = (shares_tE * logits_tE.softmax(dim=1)).sum(dim=1) * logits_tE.shape[1]
            losses[_BALANCE] = (balance_t * real_t).sum()
        return losses

    def reset(self) -> None:
        """Forget what was counted."""
        self._sums.clear()

    def metrics(self, num_layers: int, num_experts: int, topk: int, device: torch.device) -> dict[str, float]:
        """What training packs counted since `reset`, over all layers and ranks. All ranks call it together.

        Returns nothing if nothing was counted, else:
            `moe/load_max_over_mean`: tokens of a layer's fullest expert over the mean of its experts, mean over layers.
            `moe/entropy`: of the router's probabilities of a token, in nats, mean over tokens and layers.
            `moe/route_agreement`: share of a response token's experts behind the short context that compute it behind
            the long context, too; mean over response tokens and layers. Absent if no response is behind both.
            `moe/load_balancing_loss`, `moe/z_loss`: what `moe.aux_loss_coefficient` and `moe.z_loss_coefficient` weight
            for each layer; mean over the sequences of a row, over rows and over layers. Absent where that is 0.
        """
        total = torch.zeros(num_layers, num_experts + 6, dtype=torch.float64, device=device)
        for layer, sums in self._sums.items():
            total[layer - 1] = torch.cat([sums.tokens_E, sums.others_6])
        dist.all_reduce(total)
        counts, (entropy, same, pairs, balance, z, weight) = total[:, :-6], total[:, -6:].sum(dim=0).tolist()
        used = counts[counts.sum(dim=1) > 0]
        if not len(used):
            return {}
        found = {
            "moe/load_max_over_mean": float((used.amax(dim=1) / used.mean(dim=1)).mean()),
            "moe/entropy": entropy * topk / float(used.sum()),
        }
        if pairs:
            found["moe/route_agreement"] = same / (pairs * topk)
        # Each rank that shares a pack has added the weight of all its sequences, and its own share of their losses.
        losses, shards = {_BALANCE: balance, _Z_LOSS: z}, _shards().size()
        return found | {name: losses[name] * shards / weight for name in self._coefficients}


@dataclass(frozen=True)
class _LayerSums:
    tokens_E: Tensor
    """fp64: tokens of each expert."""
    others_6: Tensor
    """fp64: entropy of all tokens; equal choices and number of the pairs of response tokens; both losses, see
    `RouterWatch._losses`; `TokenPlaces.loss_scale_S` of all sequences."""

    @classmethod
    def zeros(cls, logits_tE: Tensor) -> "_LayerSums":
        new = partial(torch.zeros, dtype=torch.float64, device=logits_tE.device)
        return cls(new(logits_tE.shape[1]), new(6))

    def add(self, logits_tE: Tensor, chosen_tE: Tensor, places: TokenPlaces) -> None:
        self.tokens_E.add_((chosen_tE & places.real_t[:, None]).sum(dim=0))
        logs_tE = logits_tE.log_softmax(dim=1)
        self.others_6[0] -= ((logs_tE.exp() * logs_tE).sum(dim=1) * places.real_t).sum()
        chosen_NE = _of_responses(chosen_tE, places)
        short, long = places.pairs_2P
        self.others_6[1] += (chosen_NE[short] & chosen_NE[long]).sum()
        self.others_6[2] += len(short)

    def add_losses(self, losses: dict[str, Tensor], places: TokenPlaces) -> None:
        for place, name in ((3, _BALANCE), (4, _Z_LOSS)):
            if name in losses:
                self.others_6[place] += losses[name].detach()
        self.others_6[5] += places.loss_scale_S.sum()


def _over_runs(values_S: Tensor, places: TokenPlaces) -> Tensor:
    """[S, ...] -> [M, ...]: of a response that of its sequence, of a prompt the sum over its sequences."""
    prompts_B = values_S.new_zeros(places.num_blocks, *values_S.shape[1:]).index_add_(0, places.blocks_S, values_S)
    return torch.cat([prompts_B, values_S])


def _of_responses(chosen_tE: Tensor, places: TokenPlaces) -> Tensor:
    """uint8 [N, E], the experts of all response tokens of the pack, on every rank.

    Both responses of a pair may lie on other ranks. One byte per response token and expert is exchanged.
    """
    chosen_NE = torch.zeros(places.num_responses, chosen_tE.shape[1], dtype=torch.uint8, device=chosen_tE.device)
    chosen_NE[places.response_tokens] = chosen_tE[places.response_positions].to(torch.uint8)
    _sum_over_shards(chosen_NE)
    return chosen_NE


def _as_behind_short(chosen_tE: Tensor, places: TokenPlaces) -> Tensor:
    """The same choices, but those of the same token behind the short context where there are two."""
    short, long = places.pairs_2P
    source_N = torch.arange(places.num_responses, device=chosen_tE.device).index_copy(0, long, short)
    replayed_tE = chosen_tE.clone()
    replayed_tE[places.response_positions] = _of_responses(chosen_tE, places)[source_N[places.response_tokens]].bool()
    return replayed_tE


def _sum_over_shards(values: Tensor) -> None:
    """Sum over the ranks that divide the positions of a pack, in place."""
    if _shards().size() > 1:
        dist.all_reduce(values, group=_shards())


def _shards() -> dist.ProcessGroup:
    """The ranks that divide the positions of a pack."""
    group: dist.ProcessGroup = parallel_state.get_tensor_and_context_parallel_group()
    return group


class _WithLoss(torch.autograd.Function):
    """The first argument, whose backward pass also is that of the loss, the second."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return gradients[0], torch.ones_like(loss)

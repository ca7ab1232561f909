"""The objective and its distances: against independent plain formulas, identities and a bound."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_solopo.config import LossType, ObjectiveConfig, Role
from megatron_solopo.objective import compute_objective, further_sums, metric_names
from megatron_solopo.objective.solopo import DISTANCES, alignment_distance

ROLES = ("short_chosen", "short_rejected", "long_chosen", "long_rejected")
LOSS_TYPES = get_args(LossType)
T = 5
SETTINGS = {"beta": 0.3, "gamma": 0.6, "orpo_lambda": 0.4, "nll_coefficient": 0.15, "alpha": 1.7, "huber_delta": 0.5}
FACES = [
    {"name": "solopo"},
    {"name": "solopo", "distance": "l2"},
    {"name": "solopo", "distance": "huber"},
    {"name": "solopo", "align": "both"},
    {"name": "solopo", "detach_short": True},
    {"name": "short_po"},
    {"name": "long_po"},
]
PAIR_METRICS = {
    "loss",
    "po_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "nll_loss",
}
LONG_METRICS = {"solo_ra/loss", "solo_ra/gap_abs", "solo_ra/gap_signed", "rewards/chosen_long", "logps/chosen_long"}


def objective(loss_type: str, face: dict) -> ObjectiveConfig:
    smoothing = 0.1 if loss_type in ("dpo", "robust", "exo_pair") else 0.0
    settings = SETTINGS | ({"beta": 0.1} if loss_type == "orpo" else {})  # ORPO has none, and refuses another
    return ObjectiveConfig(loss_type=loss_type, label_smoothing=smoothing, **settings, **face)


def random_batch(dtype: torch.dtype = torch.float64) -> tuple[dict, dict, dict]:
    """Log-probabilities, lengths and reference log-probabilities; a response keeps its length over contexts."""
    generator = torch.Generator().manual_seed(0)
    answers = [torch.randint(1, 40, (T,), generator=generator) for _ in range(2)]
    lengths = dict(zip(ROLES, answers * 2, strict=True))
    logps = {
        role: (-3 * torch.rand(T, generator=generator, dtype=torch.float64) * lengths[role]).to(dtype) for role in ROLES
    }
    references = {role: logps[role] + torch.randn(T, generator=generator, dtype=dtype) for role in ROLES}
    return logps, lengths, references


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def plain_reward(config: ObjectiveConfig, logp: float, length: int, reference: float) -> float:
    p = math.exp(logp / length)
    return {
        "ipo": config.beta * (logp - reference) / length,
        "simpo": config.beta * logp / length,
        "cpo": config.beta * logp,
        "orpo": math.log(p / (1 - p)),
        "dpo_norm": config.beta * (logp - reference) / length,
    }.get(config.loss_type, config.beta * (logp - reference))


def plain_pair_loss(config: ObjectiveConfig, chosen: float, rejected: float, nll: float) -> float:
    e, margin, half = config.label_smoothing, chosen - rejected, 1 / (2 * config.beta)
    q = math.exp(-softplus(-margin))
    divergence = q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e) if e else 0.0
    return {
        "dpo": (1 - e) * softplus(-margin) + e * softplus(margin),
        "robust": ((1 - e) * softplus(-margin) - e * softplus(margin)) / (1 - 2 * e),
        "hinge": max(0.0, 1 - margin),
        "ipo": (margin / config.beta - 1 / (2 * config.beta)) ** 2,
        "simpo": softplus(config.gamma - margin),
        "cpo": softplus(-margin),
        "orpo": nll + config.orpo_lambda * softplus(-margin),
        "dpo_norm": softplus(-margin),
        "apo_zero": 1 / (1 + math.exp(chosen)) + 1 / (1 + math.exp(-rejected)),
        "apo_down": 1 / (1 + math.exp(-chosen)) + 1 / (1 + math.exp(margin)),
        "exo_pair": divergence,
        "nca_pair": softplus(-chosen) + softplus(chosen) / 2 + softplus(rejected) / 2,
        "sppo_hard": (chosen / config.beta - half) ** 2 + (rejected / config.beta + half) ** 2,
    }[config.loss_type]


def plain_distance(config: ObjectiveConfig, gap: float) -> float:
    size, delta = abs(gap), config.huber_delta
    huber = size**2 / 2 if size <= delta else delta * (size - delta / 2)
    return {"l1": size, "l2": size**2, "huber": huber}[config.distance]


def plain_triplet(config: ObjectiveConfig, row: dict[str, tuple[float, int, float]]) -> dict[str, float]:
    """One triplet's metrics from role -> (log-probability, length, reference log-probability)."""
    rewards = {role: plain_reward(config, *values) for role, values in row.items()}
    side = "long" if config.name == "long_po" else "short"
    chosen, rejected = rewards[f"{side}_chosen"], rewards[f"{side}_rejected"]
    logp, length, _ = row[f"{side}_chosen"]
    expected = {
        "po_loss": plain_pair_loss(config, chosen, rejected, -logp / length),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": float(chosen > rejected),
        "logps/chosen": logp,
        "logps/rejected": row[f"{side}_rejected"][0],
        "nll_loss": -logp / length,
    }
    expected["loss"] = expected["po_loss"] + config.nll_coefficient * expected["nll_loss"]
    if config.name == "solopo":
        gap = rewards["short_chosen"] - rewards["long_chosen"]
        expected |= {"solo_ra/gap_signed": gap, "solo_ra/gap_abs": abs(gap)}
        expected |= {"rewards/chosen_long": rewards["long_chosen"], "logps/chosen_long": row["long_chosen"][0]}
        expected["solo_ra/loss"] = plain_distance(config, gap)
        if config.align == "both":
            rejected_gap = rewards["short_rejected"] - rewards["long_rejected"]
            expected["solo_ra/gap_abs_rejected"] = abs(rejected_gap)
            expected["solo_ra/loss"] += plain_distance(config, rejected_gap)
        expected["loss"] += config.alpha * expected["solo_ra/loss"]
    return expected


@pytest.mark.parametrize("face", FACES, ids=str)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_objective_equals_the_plain_formula(loss_type, face):
    config = objective(loss_type, face)
    logps, lengths, references = random_batch()
    output = compute_objective(config, logps, lengths, references)
    for index in range(T):
        row = {
            role: (logps[role][index].item(), lengths[role][index].item(), references[role][index].item())
            for role in ROLES
        }
        expected = plain_triplet(config, row)
        assert {name: value[index].item() for name, value in output.metrics.items()} == pytest.approx(
            expected, rel=1e-10, abs=1e-10
        )
    torch.testing.assert_close(output.loss_T.detach(), output.metrics["loss"], rtol=0, atol=0)


@pytest.mark.parametrize("face", FACES, ids=str)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients(loss_type, face):
    config = objective(loss_type, face)
    logps, lengths, references = random_batch()
    roles = config.roles.all
    leaves = tuple(logps[role].clone().requires_grad_() for role in roles)

    def loss(*values):
        return compute_objective(config, dict(zip(roles, values, strict=True)), lengths, references).loss_T

    if config.detach_short:  # not a derivative by design: see test_detach_short
        assert loss(*leaves).requires_grad
    else:
        assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("loss_type", ["dpo", "robust"])
@pytest.mark.parametrize("name", ["solopo", "short_po", "long_po"])
def test_a_policy_equal_to_its_reference_starts_at_ln_2(loss_type, name):
    logps, lengths, _ = random_batch(torch.float32)
    if name == "solopo":  # reward 0 in both contexts, whatever their log-probabilities
        assert not torch.equal(logps["short_chosen"], logps["long_chosen"])
    config = ObjectiveConfig(name=name, loss_type=loss_type)
    output = compute_objective(config, logps, lengths, dict(logps))
    torch.testing.assert_close(output.loss_T, torch.full((T,), math.log(2)), rtol=0, atol=1e-7)
    zero = [metric for metric in output.metrics if metric.startswith(("rewards/", "solo_ra/"))]
    assert len(zero) == (8 if name == "solopo" else 4)
    assert all(output.metrics[metric].eq(0).all() for metric in zero)


@pytest.mark.parametrize("align", ["chosen", "both"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_identical_contexts_reduce_solopo_to_short_po(loss_type, align):
    logps, lengths, references = random_batch()
    results = {}
    for name in ("solopo", "short_po", "long_po"):
        leaves = {role: logps[role.replace("long", "short")].clone().requires_grad_() for role in ROLES}
        reference = {role: references[role.replace("long", "short")] for role in ROLES}
        config = objective(loss_type, {"name": name, "align": align})
        output = compute_objective(config, leaves, lengths, reference)
        output.loss_T.sum().backward()
        results[name] = (output.loss_T.detach(), leaves)
    torch.testing.assert_close(results["solopo"][0], results["short_po"][0], rtol=0, atol=0)
    torch.testing.assert_close(results["long_po"][0], results["short_po"][0], rtol=0, atol=0)
    for role in ("short_chosen", "short_rejected"):
        torch.testing.assert_close(results["solopo"][1][role].grad, results["short_po"][1][role].grad, rtol=0, atol=0)


@pytest.mark.parametrize("align", ["chosen", "both"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_detach_short_leaves_the_short_side_to_the_pair_loss(loss_type, align):
    gradients, losses = {}, {}
    for key, face in {
        "attached": {"align": align},
        "detached": {"align": align, "detach_short": True},
        "pair only": {"name": "short_po"},
    }.items():
        logps, lengths, references = random_batch()
        leaves = {role: value.requires_grad_() for role, value in logps.items()}
        output = compute_objective(objective(loss_type, face), leaves, lengths, references)
        output.loss_T.sum().backward()
        losses[key] = output.loss_T.detach()
        gradients[key] = {role: leaf.grad for role, leaf in leaves.items()}
    torch.testing.assert_close(losses["detached"], losses["attached"], rtol=0, atol=0)
    for role in ("short_chosen", "short_rejected"):
        torch.testing.assert_close(gradients["detached"][role], gradients["pair only"][role], rtol=0, atol=0)
    assert not torch.allclose(gradients["attached"]["short_chosen"], gradients["pair only"]["short_chosen"])
    torch.testing.assert_close(gradients["detached"]["long_chosen"], gradients["attached"]["long_chosen"])
    assert gradients["detached"]["long_chosen"].abs().min() > 0


def test_verbose_tokens_have_their_weight_in_rewards_alone():
    """LD-DPO: log pi(y) = log pi(y up to the shorter length) + ld_alpha * log pi(the rest)."""
    logps, lengths, references = random_batch()
    verbose = {role: 0.4 * logps[role] * torch.arange(T) / T for role in ROLES}
    config = ObjectiveConfig(ld_alpha=0.3, nll_coefficient=0.2, beta=0.7)
    found = compute_objective(config, logps, lengths, references, {"verbose_logps": verbose}).metrics
    weighted = {role: (logps[role] - verbose[role]) + 0.3 * verbose[role] for role in ROLES}
    plain = ObjectiveConfig(nll_coefficient=0.2, beta=0.7)
    expected = compute_objective(plain, weighted, lengths, references).metrics
    for name in ("po_loss", "solo_ra/loss", "rewards/chosen", "rewards/rejected", "rewards/chosen_long"):
        torch.testing.assert_close(found[name], expected[name])
    torch.testing.assert_close(found["nll_loss"], -logps["short_chosen"] / lengths["short_chosen"])
    torch.testing.assert_close(found["logps/chosen"], logps["short_chosen"])


@pytest.mark.parametrize("loss_type", ["dpo", "simpo"])
def test_the_weight_of_a_pair_multiplies_the_pair_loss_and_its_gradient(loss_type):
    """WPO: the product over both answers of exp(mean over tokens of log p - log sum of p**2)."""
    logps, lengths, references = random_batch()
    leaves = {role: logps[role].clone().requires_grad_() for role in ROLES}
    squares = {role: 0.5 * logps[role] for role in ROLES}
    settings = {"loss_type": loss_type, "nll_coefficient": 0.2, "beta": 0.7}
    config = ObjectiveConfig(use_weighting=True, **settings)
    output = compute_objective(config, leaves, lengths, references, {"log_squares": squares})
    output.loss_T.sum().backward()
    without = {role: logps[role].clone().requires_grad_() for role in ROLES}
    plain = compute_objective(ObjectiveConfig(**settings), without, lengths, references)
    weights = [
        math.exp(sum((logps[role][t].item() - squares[role][t].item()) / lengths[role][t].item() for role in ROLES[:2]))
        for t in range(T)
    ]
    weights_T = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(output.metrics["wpo_weights"], weights_T)
    torch.testing.assert_close(output.metrics["po_loss"], weights_T * plain.metrics["po_loss"])
    others_T = plain.loss_T - plain.metrics["po_loss"]
    torch.testing.assert_close(output.loss_T, weights_T * plain.metrics["po_loss"] + others_T)
    (plain.loss_T + (weights_T - 1) * _pair_loss_of(without, lengths, references, settings)).sum().backward()
    for role in ROLES[:3]:
        torch.testing.assert_close(leaves[role].grad, without[role].grad)


def _pair_loss_of(leaves, lengths, references, settings):
    """The pair loss alone, with its gradient."""
    config = ObjectiveConfig(name="short_po", **(settings | {"nll_coefficient": 0.0}))
    return compute_objective(config, leaves, lengths, references).loss_T


def test_the_term_per_token_is_a_mean_over_the_chosen_answer():
    logps, lengths, references = random_batch()
    divergence_T = torch.arange(1.0, T + 1, dtype=torch.float64, requires_grad=True)
    zeros = dict.fromkeys(ROLES, torch.zeros(T, dtype=torch.float64))
    further = {"divergences": zeros | {"long_chosen": divergence_T}}
    config = ObjectiveConfig(token_alignment="reverse_kl", token_alignment_weight=0.7)
    found = compute_objective(config, logps, lengths, references, further)
    found.loss_T.sum().backward()
    without = compute_objective(ObjectiveConfig(), logps, lengths, references)
    expected_T = divergence_T.detach() / lengths["long_chosen"]
    torch.testing.assert_close(found.metrics["token_alignment/kl"], expected_T)
    torch.testing.assert_close(found.loss_T, without.loss_T + 0.7 * expected_T)
    torch.testing.assert_close(divergence_T.grad, 0.7 / lengths["long_chosen"].double())
    assert not ObjectiveConfig(name="long_po", token_alignment="reverse_kl").aligns_tokens


def test_what_an_objective_sums_besides_log_probabilities():
    assert further_sums(ObjectiveConfig()) == ()
    both = ObjectiveConfig(ld_alpha=0.0, use_weighting=True, token_alignment="reverse_kl")
    assert further_sums(both) == ("verbose_logps", "log_squares", "divergences")
    assert "wpo_weights" in metric_names(both) and "wpo_weights" not in metric_names(ObjectiveConfig())


def test_alpha_defaults_to_the_papers():
    logps, lengths, references = random_batch()
    for loss_type, alpha in {"dpo": 3.0, "simpo": 1.0, "orpo": 1.0}.items():
        metrics = compute_objective(ObjectiveConfig(loss_type=loss_type), logps, lengths, references).metrics
        torch.testing.assert_close(metrics["loss"], metrics["po_loss"] + alpha * metrics["solo_ra/loss"])


number = st.floats(-30, 30)


@settings(max_examples=200)
@given(number, number, number, number)
def test_short_pair_and_gaps_bound_the_long_loss(short_chosen, short_rejected, long_chosen, long_rejected):
    """Jensen over three terms: L_PO(x_long) <= [f(3 m_short) + s(3 g_w) + s(3 g_l)] / 3 with s(g) = ln 2 + |g|."""
    values = (short_chosen, short_rejected, long_chosen, long_rejected)
    logps = {role: torch.tensor([value], dtype=torch.float64) for role, value in zip(ROLES, values, strict=True)}
    nothing = {role: torch.zeros(1, dtype=torch.float64) for role in ROLES}
    ones = {role: torch.ones(1, dtype=torch.int64) for role in ROLES}
    long_loss = compute_objective(ObjectiveConfig(name="long_po", beta=1.0), logps, ones, nothing).loss_T
    tripled = {role: 3 * value for role, value in logps.items()}
    solopo = ObjectiveConfig(align="both", beta=1.0)
    bound = compute_objective(solopo, tripled, ones, nothing).metrics
    assert long_loss.item() <= (bound["po_loss"] + bound["solo_ra/loss"]).item() / 3 + 2 * math.log(2) / 3 + 1e-9


@pytest.mark.parametrize(
    ("face", "roles"),
    [
        ({"name": "solopo"}, ROLES[:3]),
        ({"name": "solopo", "align": "both"}, ROLES),
        ({"name": "short_po", "align": "both"}, ROLES[:2]),
        ({"name": "long_po", "align": "both"}, ROLES[2:]),
    ],
    ids=str,
)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_only_the_required_roles_are_read(face, roles, loss_type):
    config = objective(loss_type, face)
    assert config.roles.all == roles
    logps, lengths, references = ({role: values[role] for role in roles} for values in random_batch())
    assert compute_objective(config, logps, lengths, references).loss_T.shape == (T,)


def test_sft_is_the_likelihood_per_token_of_the_chosen_response_alone():
    config = ObjectiveConfig(name="sft")
    role = Role.SHORT_CHOSEN
    assert config.roles.all == (role,) and not config.needs_reference
    logps, lengths, _ = random_batch()
    found = compute_objective(config, {role: logps[role]}, {role: lengths[role]})
    torch.testing.assert_close(found.loss_T, -logps[role] / lengths[role])
    assert metric_names(config) == tuple(found.metrics) == ("loss", "logps/chosen", "nll_loss")


@pytest.mark.parametrize("face", FACES, ids=str)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_metric_names_are_those_computed(face, loss_type):
    config = objective(loss_type, face)
    logps, lengths, references = random_batch(torch.float32)
    leaves = {role: value.requires_grad_() for role, value in logps.items()}
    metrics = compute_objective(config, leaves, lengths, references).metrics
    expected = PAIR_METRICS | (LONG_METRICS if config.name == "solopo" else set())
    if face.get("align") == "both":
        expected = expected | {"solo_ra/gap_abs_rejected"}
    assert metric_names(config) == tuple(metrics)
    assert set(metrics) == expected
    for value_T in metrics.values():
        assert value_T.shape == (T,)
        assert value_T.dtype == torch.float32
        assert not value_T.requires_grad


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_triplets_give_an_empty_differentiable_loss(loss_type):
    empty = {role: torch.zeros(0, requires_grad=True) for role in ROLES}
    loss_T = compute_objective(objective(loss_type, {}), empty, empty, empty).loss_T
    loss_T.sum().backward()
    assert loss_T.shape == (0,)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_reference_is_demanded_exactly_where_needed(loss_type):
    config = objective(loss_type, {})
    logps, lengths, references = random_batch()
    if config.needs_reference:
        with pytest.raises(AssertionError, match="reference"):
            compute_objective(config, logps, lengths)
    else:
        with_reference = compute_objective(config, logps, lengths, references).loss_T
        assert torch.equal(compute_objective(config, logps, lengths).loss_T, with_reference)


def test_half_precision_sums_are_refused():
    logps, lengths, references = random_batch(torch.bfloat16)
    with pytest.raises(AssertionError, match="float32"):
        compute_objective(ObjectiveConfig(), logps, lengths, references)


GAPS = [-7.0, -1.0, -0.2, 0.0, 0.3, 1.0, 4.0]
DELTA = 0.8


def distance(gaps: torch.Tensor, kind: str, detach_short: bool = False) -> torch.Tensor:
    long_T = torch.linspace(-3, 2, len(GAPS), dtype=gaps.dtype)
    return alignment_distance(long_T + gaps, long_T, kind, DELTA, detach_short)


def huber(gap: float) -> float:
    return gap * gap / 2 if abs(gap) <= DELTA else DELTA * (abs(gap) - DELTA / 2)


@pytest.mark.parametrize(("kind", "formula"), [("l1", abs), ("l2", lambda g: g * g), ("huber", huber)])
def test_distances_equal_their_formulae(kind, formula):
    values_T = distance(torch.tensor(GAPS, dtype=torch.float64), kind)
    assert values_T.tolist() == pytest.approx([formula(gap) for gap in GAPS], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", DISTANCES)
def test_gradients_of_the_distances(kind):
    short_T = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    long_T = torch.tensor([-2.0, 0.9, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, x: alignment_distance(s, x, kind, DELTA, False), (short_T, long_T))


@pytest.mark.parametrize("kind", DISTANCES)
def test_detach_short_moves_the_long_side_alone(kind):
    gradients = {}
    for detach in (False, True):
        short_T = torch.tensor([-1.5, 0.3], dtype=torch.float64, requires_grad=True)
        long_T = torch.tensor([-2.0, 0.9], dtype=torch.float64, requires_grad=True)
        value_T = alignment_distance(short_T, long_T, kind, DELTA, detach)
        value_T.sum().backward()
        gradients[detach] = (value_T.tolist(), short_T.grad, long_T.grad)
    assert gradients[True][0] == gradients[False][0]
    assert gradients[True][1] is None
    torch.testing.assert_close(gradients[False][1], -gradients[False][2])
    torch.testing.assert_close(gradients[True][2], gradients[False][2])
    # A long reward below the short one is pulled up, one above it down.
    assert gradients[True][2][0] < 0 < gradients[True][2][1]


@pytest.mark.parametrize("kind", DISTANCES)
def test_no_gap_no_gradient(kind):
    reward_T = torch.tensor([-1.5, 0.0], requires_grad=True)
    alignment_distance(reward_T, reward_T.detach().clone(), kind, DELTA, False).sum().backward()
    assert reward_T.grad.tolist() == [0.0, 0.0]


def test_distances_are_those_of_the_config():
    assert set(DISTANCES) == set(get_args(ObjectiveConfig.model_fields["distance"].annotation))

"""The reference that everything is compared with: transformers, one process, one sequence at a time.

It shares no code with the package. Written to be read beside the paper's formulas.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

Row = Mapping[str, Any]
"""id; prompt_short, prompt_long, chosen, rejected: token ids. A row may have chosen_mask and rejected_mask: whether
each token counts."""


@dataclass
class PlainStep:
    """One optimizer step: mean loss, gradient by Hugging Face name, norm of the whole gradient."""

    loss: float
    gradients: dict[str, Tensor]
    grad_norm: float
    parameters: dict[str, Tensor]
    """After the step, by Hugging Face name."""
    routing: dict[str, float]
    """Metrics of routers, for a model with experts."""


def load(path: Path) -> torch.nn.Module:
    """A model that scores, in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def counted(row: Row, answer: str) -> list[int]:
    """The places in a response of the tokens that count."""
    mask = row.get(f"{answer}_mask", [True] * len(row[answer]))
    return [place for place, counts in enumerate(mask) if counts]


def predictions(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Log-probabilities of the whole vocabulary where the response tokens are predicted, [tokens, vocabulary]."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(dim=-1)


def of_tokens(predicted: Tensor, response: Sequence[int]) -> Tensor:
    """Log-probability of each response token."""
    return predicted.gather(1, torch.tensor(response)[:, None]).squeeze(1)


def response_logprob(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Sum of the log-probabilities of the response tokens after the prompt."""
    return of_tokens(predictions(model, prompt, response), response).sum()


def saved_name(name: str) -> str:
    """The name of a parameter in a file, for that of a model with an adapter."""
    if ".lora_" in name:
        return name.replace(".default.", ".")
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


Replayed = dict[str, list[Tensor]]
"""By answer: each layer's experts [tokens, experts per token] of its tokens behind the short context."""


@contextmanager
def replaying(model: torch.nn.Module, row: Row, context: str, answer: str, kept: Replayed | None) -> Iterator[None]:
    """Within the block, keep the experts of a response behind the short context, and replay them behind the long one.

    The experts of a position weigh as its own logits say. `kept` is None where nothing is replayed. A response that is
    read behind the long context alone has nothing to replay.
    """
    if context == "long" and kept is not None and answer not in kept:
        kept = None
    first = len(row[f"prompt_{context}"]) - 1
    places = slice(first, first + len(row[answer]))
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    if context == "short" and kept is not None:
        kept[answer] = []

    def after(gate: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        assert kept is not None
        logits, scores, experts = output
        if context == "short":
            kept[answer].append(experts[places])
            return output
        experts = experts.clone()
        experts[places] = kept[answer][gates.index(gate)]
        scores = logits.softmax(dim=-1).gather(1, experts)
        if getattr(gate, "norm_topk_prob", True):
            scores = scores / scores.sum(dim=-1, keepdim=True)
        return logits, scores, experts

    with ExitStack() as stack:
        for gate in gates if kept is not None else ():
            stack.callback(gate.register_forward_hook(after).remove)
        yield


def trained(model: torch.nn.Module, routers: bool) -> list[torch.nn.Parameter]:
    """The parameters to train: all, or all but those that choose among experts."""
    return [each for name, each in model.named_parameters() if routers or not name.endswith("mlp.gate.weight")]


def published(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Tensors by their names in published checkpoints, where every expert has its own.

    transformers 5 holds the experts of a layer in two tensors, [experts, gate and up, H] and [experts, H, columns].
    """
    block, gate, up, down = (
        ("block_sparse_moe", "w1", "w3", "w2")
        if model_type == "mixtral"
        else ("mlp", "gate_proj", "up_proj", "down_proj")
    )
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, is_expert, kind = name.partition("mlp.experts.")
        if not is_expert or tensor.dim() != 3:
            found[name.replace(".mlp.gate.", f".{block}.gate.")] = tensor
            continue
        for number, expert in enumerate(tensor):
            parts = zip((gate, up), expert.chunk(2), strict=True) if kind == "gate_up_proj" else [(down, expert)]
            found |= {f"{prefix}{block}.experts.{number}.{part}.weight": value for part, value in parts}
    return found


def parameters(path: Path) -> dict[str, Tensor]:
    """A model's parameters by their names in published checkpoints."""
    model = load(path)
    return published({name: each.detach() for name, each in model.named_parameters()}, model.config.model_type)


def adapter_parameters(adapter: Path) -> dict[str, Tensor]:
    """What a PEFT directory holds."""
    return load_file(adapter / "adapter_model.safetensors")


Routes = Mapping[tuple[str, str], list[Tensor]]
"""For each context and answer of a row: every sparse layer's router logits [tokens, experts]."""


def sequences(o: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Context and answer of every sequence that objective `o` reads."""
    if o["name"] == "sft":
        return [("short", "chosen")]
    if o["name"] != "solopo":
        context = o["name"].removesuffix("_po")
        return [(context, "chosen"), (context, "rejected")]
    return [
        *[("short", "chosen"), ("short", "rejected"), ("long", "chosen")],
        *([("long", "rejected")] if o.get("align") == "both" else []),
    ]


def routes(o: Mapping[str, Any], model: Any, row: Row, replay: bool) -> Routes:
    """Run every sequence that objective `o` reads, and keep what the routers say."""
    kept: Replayed | None = {} if replay else None
    found = {}
    for context, answer in sequences(o):
        with replaying(model, row, context, answer, kept):
            tokens = torch.tensor([[*row[f"prompt_{context}"], *row[answer]]])
            found[context, answer] = model(tokens, output_router_logits=True).router_logits
    return found


def router_loss(model: Any, batch: Sequence[Routes], aux: float, z: float) -> tuple[Tensor, dict[str, float]]:
    """The losses of all layers' routers, mean over the sequences of a row, then over rows; and their metrics.

    The balance is transformers' own function.
    """
    config, total = model.config, torch.zeros(2)
    for logits_of in batch:
        for layers in logits_of.values():
            for logits in layers:
                balance = load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
                losses = torch.stack([balance, logits.logsumexp(dim=-1).square().mean()])
                total = total + losses / len(logits_of)
    balance, z_loss = total / len(batch)
    num_layers = len(next(iter(batch[0].values())))
    metrics = {"moe/load_balancing_loss": balance.item() / num_layers} if aux else {}
    metrics |= {"moe/z_loss": z_loss.item() / num_layers} if z else {}
    return aux * balance + z * z_loss, metrics


def routing_metrics(
    model: Any, batch: Sequence[Routes], rows: Sequence[Row], replay: bool, share_prompts: bool
) -> dict[str, float]:
    """How full the fullest expert is, how undecided the routers are, and whether the contexts share their experts.

    A shared prompt counts once: with the chosen response.
    """

    def counted_once(row: Row, context: str, answer: str) -> slice:
        return slice(len(row[f"prompt_{context}"]) if share_prompts and answer == "rejected" else 0, None)

    topk, layers = model.config.num_experts_per_tok, range(len(next(iter(batch[0].values()))))
    loads, entropies, same, pairs = [], [], 0, 0
    for layer in layers:
        everything = torch.cat(
            [
                logits[layer].detach()[counted_once(row, *key)]
                for row, logits_of in zip(rows, batch, strict=True)
                for key, logits in logits_of.items()
            ]
        )
        entropies.append(torch.distributions.Categorical(logits=everything.double()).entropy())
        chosen = []
        for row, logits_of in zip(rows, batch, strict=True):
            experts = {key: logits[layer].topk(topk).indices for key, logits in logits_of.items()}
            for context, answer in logits_of:
                if context == "long" and ("short", answer) in logits_of:
                    places = [
                        slice(len(row[f"prompt_{each}"]) - 1, len(row[f"prompt_{each}"]) - 1 + len(row[answer]))
                        for each in ("short", "long")
                    ]
                    short, long = experts["short", answer][places[0]], experts["long", answer][places[1]]
                    if replay:
                        long.copy_(short)
                    same += sum(
                        len(set(one) & set(other)) for one, other in zip(short.tolist(), long.tolist(), strict=True)
                    )
                    pairs += topk * len(short)
            chosen += [each[counted_once(row, *key)] for key, each in experts.items()]
        counts = torch.cat(chosen).flatten().bincount(minlength=everything.shape[1]).double()
        loads.append(float(counts.max() / counts.mean()))
    return {
        "moe/load_max_over_mean": sum(loads) / len(loads),
        "moe/entropy": float(torch.cat(entropies).mean()),
        "moe/route_agreement": same / pairs,
    }


def _reward(loss_type: str, beta: float, logp: Tensor, length: int, reference: Tensor) -> Tensor:
    if loss_type == "simpo":
        return beta * logp / length
    if loss_type == "orpo":
        mean = logp / length
        return mean - torch.log(1 - torch.exp(mean))
    if loss_type == "cpo":
        return beta * logp
    if loss_type in ("ipo", "dpo_norm"):
        return beta * (logp - reference) / length
    return beta * (logp - reference)


def _pair_loss(o: Mapping[str, Any], chosen: Tensor, rejected: Tensor, nll: Tensor) -> Tensor:
    beta, margin, smoothing = o["beta"], chosen - rejected, o.get("label_smoothing", 0.0)
    match o["loss_type"]:
        case "dpo" | "dpo_norm":
            return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
        case "robust":
            return (-(1 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)) / (1 - 2 * smoothing)
        case "hinge":
            return torch.relu(1 - margin)
        case "ipo":
            return (margin / beta - 1 / (2 * beta)) ** 2
        case "simpo":
            return -F.logsigmoid(margin - o.get("gamma", 0.5))
        case "cpo":
            return -F.logsigmoid(margin)
        case "orpo":
            return nll - o.get("orpo_lambda", 1.0) * F.logsigmoid(margin)
        case "apo_zero":
            return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)
        case "apo_down":
            return torch.sigmoid(chosen) + 1 - torch.sigmoid(margin)
        case "nca_pair":
            return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2
        case "sppo_hard":
            return (chosen / beta - 1 / (2 * beta)) ** 2 + (rejected / beta + 1 / (2 * beta)) ** 2
        case "exo_pair":
            model, labels = torch.stack([margin, 0 * margin]).softmax(0), torch.tensor([1 - smoothing, smoothing])
            return (model * (model / labels).log()).sum()
    raise KeyError(o["loss_type"])


def _distance(o: Mapping[str, Any], gap: Tensor) -> Tensor:
    match o.get("distance", "l1"):
        case "l1":
            return gap.abs()
        case "l2":
            return gap**2
        case "huber":
            return F.huber_loss(gap, torch.zeros(()), delta=o.get("huber_delta", 1.0))
    raise KeyError(o["distance"])


def triplet_loss(
    o: Mapping[str, Any],
    model: torch.nn.Module,
    reference: torch.nn.Module,
    row: Row,
    *,
    replay: bool = False,
    reference_context: str | None = None,
) -> Tensor:
    """Loss of one triplet under objective `o` (the keys of the `objective` section).

    Args:
        reference_context: the context that the reference reads; None: that of the policy.
    """
    beta = o["beta"]
    kept: list[Replayed | None] = [{}, {}] if replay else [None, None]

    shorter = min(len(counted(row, answer)) for answer in ("chosen", "rejected"))
    verbose = 1.0 if o.get("ld_alpha") is None else o["ld_alpha"]

    def score(context: str, answer: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        prompt, response, places = row[f"prompt_{context}"], row[answer], counted(row, answer)
        with replaying(model, row, context, answer, kept[0]):
            predicted = predictions(model, prompt, response)[places]
            logps = of_tokens(predicted, [response[place] for place in places])
        with torch.no_grad(), replaying(reference, row, context, answer, kept[1]):
            reference_prompt = row[f"prompt_{reference_context or context}"]
            reference_logps = of_tokens(predictions(reference, reference_prompt, response), response)[places]
        logp, reference_logp = (
            each[:shorter].sum() + verbose * each[shorter:].sum() for each in (logps, reference_logps)
        )
        confidence = logps - predicted.exp().square().sum(dim=-1).log()
        reward = _reward(o["loss_type"], beta, logp, len(places), reference_logp)
        return reward, -logps.mean(), confidence.mean().exp().detach(), predicted

    if o["name"] == "sft":
        return score("short", "chosen")[1]
    context = "long" if o["name"] == "long_po" else "short"
    chosen, nll, chosen_weight, teacher = score(context, "chosen")
    rejected, _, rejected_weight, _ = score(context, "rejected")
    loss = _pair_loss(o, chosen, rejected, nll)
    if o.get("use_weighting"):
        loss = loss * chosen_weight * rejected_weight
    loss = loss + o.get("nll_coefficient", 0.0) * nll
    if o["name"] == "solopo":
        usual = 3.0 if o["loss_type"] == "dpo" else 1.0
        alpha = usual if o.get("alpha") is None else o["alpha"]
        answers = {"chosen": chosen}
        if o.get("align") == "both":
            answers["rejected"] = rejected
        for answer, short in answers.items():
            short = short.detach() if o.get("detach_short") else short
            long, _, _, student = score("long", answer)
            loss = loss + alpha * _distance(o, short - long)
            if o.get("token_alignment") and answer == "chosen":
                divergence = F.kl_div(teacher.detach(), student, reduction="none", log_target=True).sum(dim=-1)
                loss = loss + o.get("token_alignment_weight", 1.0) * divergence.mean()
    return loss


def train(
    o: Mapping[str, Any],
    policy: Path,
    reference: Path,
    batches: Sequence[Sequence[Row]],
    lr: float,
    eps: float,
    *,
    routers: bool = True,
    aux: float = 0.0,
    z: float = 0.0,
    adapter: Path | None = None,
    replay: bool = False,
    share_prompts: bool = False,
    reference_context: str | None = None,
    names: Sequence[str] = (),
) -> list[PlainStep]:
    """AdamW steps (betas 0.9, 0.95, no decay, no clipping), one per batch, of all parameters or all but routers.

    Args:
        aux, z: weights of the losses of routers.
        adapter: directory of a PEFT adapter, which alone is trained.
        replay: whether responses take the experts behind the long context that they take behind the short one.
        share_prompts: whether metrics of routers count a prompt once for both responses.
        reference_context: see `triplet_loss`.
        names: `name` of the objective of each row of a batch; empty: that of `o`.
    """
    model, frozen = load(policy), load(reference)
    learning = trained(model, routers)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        learning = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr, betas=(0.9, 0.95), eps=eps, weight_decay=0.0)
    of_learning = {id(each) for each in learning}
    steps = []
    for batch in batches:
        model.zero_grad()
        of_rows = {"replay": replay, "reference_context": reference_context}
        objectives = [dict(o, name=name) for name in names or [o["name"]] * len(batch)]
        losses = [triplet_loss(own, model, frozen, row, **of_rows) for own, row in zip(objectives, batch, strict=True)]
        loss = torch.stack(losses).mean()
        routing = {}
        if hasattr(model.config, "num_experts_per_tok"):
            batch_routes = [routes(own, model, row, replay) for own, row in zip(objectives, batch, strict=True)]
            of_routers, routing = router_loss(model, batch_routes, aux, z)
            (loss + of_routers).backward()
            routing |= routing_metrics(model, batch_routes, batch, replay, share_prompts)
        else:
            loss.backward()
        gradients = {
            saved_name(name): p.grad.clone()
            for name, p in model.named_parameters()
            if p.grad is not None and id(p) in of_learning
        }
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))
        optimizer.step()
        values = {saved_name(name): p.detach().clone() for name, p in model.named_parameters()}
        kind = model.config.model_type
        steps.append(PlainStep(loss.item(), published(gradients, kind), norm, published(values, kind), routing))
    return steps

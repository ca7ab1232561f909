"""Log-probability of every response token, by our model under a parallel layout and by transformers."""

import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_solopo.config import ObjectiveConfig, parse_config
from megatron_solopo.data.packing import Pack, build_pack
from megatron_solopo.model.microbatch import Microbatch
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.context import shard_indices
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.policy import load_model
from megatron_solopo.train.step import run_schedule
from tests.parity.layouts import tokenized
from tests.tiny_models import VOCAB_SIZE

ROLES = ObjectiveConfig().roles.all


def make_row() -> dict[str, Any]:
    """Prompts of one token and of many, so that every position of two sequences is scored."""
    generator = random.Random(5)
    lengths = {"prompt_short": 1, "prompt_long": 60, "chosen": 41, "rejected": 13}
    tokens = {name: [generator.randrange(VOCAB_SIZE) for _ in range(length)] for name, length in lengths.items()}
    return {"id": "row"} | tokens


def score(chunks: Sequence[torch.nn.Module], groups: Topology) -> Tensor | None:
    """This rank's addend to the log-probabilities [N] of the row's response tokens; None where it has none."""
    pack = build_pack(
        [tokenized(make_row(), 0)], ROLES, groups.sequence_multiple, groups.pack_multiple(), share_prompts=False
    )
    count = torch.tensor(1, dtype=torch.int)

    def keep(microbatch: Microbatch, logprobs_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return logprobs_N.sum(), count, logprobs_N

    with torch.no_grad():
        reports = run_schedule(
            chunks, [pack] * groups.packs_multiple, lambda each: partial(keep, each), groups, forward_only=True
        )
    if not reports or groups.tensor_group.rank():
        return None
    return _at_their_places(reports[0], pack, groups)


def _at_their_places(here_N: Tensor, pack: Pack, groups: Topology) -> Tensor:
    size, rank = groups.context_group.size(), groups.context_group.rank()
    held = shard_indices(pack.cu_seqlens_B1, size, rank)
    found = torch.zeros(len(pack.response_rows_N))
    found[torch.isin(pack.response_rows_N, held)] = here_N.float()
    return found


def score_path(path: Path, parallel: Mapping[str, Any]) -> Tensor | None:
    """Load `path` under a layout, on all ranks together, and score."""
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {"path": path},
            "data": {"path": "unused", "max_tokens_per_pack": 1000},
            "training": {"global_batch_size": 1},
            "parallel": dict(parallel),
        },
        source="test",
    )
    groups = topology.initialize(config.parallel, seed=1)
    try:
        model = resolve_model(config.model, config.parallel)
        return score(load_model(model, groups, chunk_tokens=config.logprob.chunk_tokens), groups)
    finally:
        topology.destroy(groups)


def expected(path: Path) -> Tensor:
    """What transformers makes of a Hugging Face directory: [N], one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    row, found = make_row(), []
    for role in ROLES:
        context, answer = role.context, role.response
        prompt, response = row[f"prompt_{context}"], row[answer]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0]
        predictions = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
        found.append(predictions.gather(1, torch.tensor(response)[:, None]).squeeze(1))
    return torch.cat(found)


def joined(ranks: Sequence[Tensor | None]) -> Tensor:
    """The whole scores, from every rank's addend of one data-parallel replica."""
    return torch.stack([each for each in ranks if each is not None]).sum(0)

#!/usr/bin/env python3
"""Does vLLM compute from an exported directory what transformers computes from it?

    python -m tools.checks.vllm_check --vllm-python VLLM_ENVIRONMENT/bin/python

For every family a tiny model of random weights is imported, exported and loaded by vLLM, in an environment of its own,
as it is. Compared are the log-probs of the whole vocabulary at every position of some prompts and of the tokens that
vLLM generates greedily; transformers, in fp32, is the reference. In float32 no difference may exceed 1e-4, and every
token must be the reference's; in bfloat16 vLLM may be off by at most twice what transformers in bfloat16 is. Exit code
1 where something differs. On a CPU, about 30 s for each family and precision.
"""

import json
import os
import random
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_solopo.checkpoint.conversion import export_model, import_model
from tests import tiny_models
from tests.prepared import make_tokenizer
from tools.reporting import environment, table

CHILD = Path(__file__).with_name("vllm_logprobs.py")
FAMILIES = tuple(tiny_models.FAMILIES)
PROMPT_LENGTHS = (4, 17, 100, 200)
NEW_TOKENS = 40  # the longest sequence still fits the 256 positions of the YaRN model
FP32_LIMIT = 1e-4
BF16_RATIO = 2.0
# vLLM's attention on CPUs has no kernel for the heads of 8 that the tests' models have.
WIDER = {"hidden_size": 128, "head_dim": 32}
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@dataclass(frozen=True)
class Found:
    """How far from transformers in fp32; absolute differences of log-probs."""

    positions: int
    vllm: float
    transformers: float
    """In the directory's own precision; 0 where that is fp32."""
    tokens: int
    same_tokens: int

    def problem(self, dtype: str) -> str:
        """What is wrong, or an empty string."""
        limit = FP32_LIMIT if dtype == "float32" else BF16_RATIO * self.transformers
        if not self.vllm <= limit:
            return f"differs by more than {limit:.1e}"
        if dtype == "float32" and self.same_tokens != self.tokens:
            return "other tokens"
        return ""


def exported(folder: Path, family: str, dtype: Any) -> Path:
    """A directory that went through Megatron's form."""
    tiny_models.make_model(make_tokenizer(folder / "source"), family, **WIDER)
    import_model(folder / "source", folder / "megatron", verification="full")
    export_model(folder / "megatron", folder / "exported", dtype=dtype, verification="full")
    return folder / "exported"


def asked() -> dict[str, Any]:
    """The same prompts for every model."""
    draw = random.Random(0)
    prompts = [[draw.randrange(2, tiny_models.VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]
    return {"prompts": prompts, "new_tokens": NEW_TOKENS}


def ask_vllm(python: Path, model: Path, dtype: str, request: dict[str, Any]) -> dict[str, Any]:
    """See vllm_logprobs.py."""
    question, answer = model.with_name("request.json"), model.with_name("answer.json")
    question.write_text(json.dumps(request), encoding="utf-8")
    command = [str(python), str(CHILD), *map(str, (model, question, answer)), dtype]
    # Not ours: that environment has its own packages.
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=own | OFFLINE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise click.ClickException(f"vLLM failed on {model}:\n{done.stdout[-3000:]}")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


@torch.inference_mode()
def logprobs(model: Path, sequences: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    """fp32 [tokens - 1, vocabulary] of each sequence, by transformers: what follows every token but the last."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return [network(torch.tensor([each])).logits[0, :-1].float().log_softmax(-1) for each in sequences]


def compare(model: Path, dtype: str, request: dict[str, Any], answers: Sequence[dict[str, Any]]) -> Found:
    """Hold vLLM's answers against transformers on the same directory."""
    sequences = [[*prompt, *answer["tokens"]] for prompt, answer in zip(request["prompts"], answers, strict=True)]
    reference = logprobs(model, sequences, torch.float32)
    own = logprobs(model, sequences, getattr(torch, dtype))
    theirs = [torch.tensor(answer["logprobs"]) for answer in answers]
    # Greedy generation is the reference's where each token is its choice behind those before.
    chosen = [
        row.argmax(-1)[-request["new_tokens"] :] == torch.tensor(answer["tokens"])
        for row, answer in zip(reference, answers, strict=True)
    ]
    return Found(
        positions=sum(map(len, reference)),
        vllm=largest(theirs, reference),
        transformers=largest(own, reference),
        tokens=sum(map(len, chosen)),
        same_tokens=int(sum(each.sum() for each in chosen)),
    )


def largest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Absolute difference; NaN where there is one."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]).max())


@click.command(help=__doc__.replace("    python", "\b\n    python"))
@click.option("--vllm-python", type=click.Path(exists=True, path_type=Path), required=True,
              help="Python of the environment that vLLM is installed in.")  # fmt: skip
@click.option(
    "--family", "families", type=click.Choice(FAMILIES), multiple=True, help="May be repeated.  [default: all]"
)
@click.option("--dtype", "dtypes", type=click.Choice(["float32", "bfloat16"]), multiple=True,
              default=("float32", "bfloat16"), show_default=True, help="Of the export. May be repeated.")  # fmt: skip
def main(vllm_python: Path, families: Sequence[str], dtypes: Sequence[str]) -> None:
    """Check every family, print a table."""
    request, cells, versions = asked(), [], set()
    for family in families or FAMILIES:
        for dtype in dtypes:
            with tempfile.TemporaryDirectory() as folder:
                model = exported(Path(folder), family, dtype)
                answer = ask_vllm(vllm_python, model, dtype, request)
                found = compare(model, dtype, request, answer["answers"])
            versions.add(answer["version"])
            numbers = [str(found.positions), f"{found.vllm:.1e}", f"{found.transformers:.1e}"]
            tokens = f"{found.same_tokens} of {found.tokens}"
            cells.append([family, dtype, *numbers, tokens, found.problem(dtype) or "agrees"])
            click.echo(f"| {' | '.join(cells[-1])} |", err=True)
    about = environment(("torch", "transformers", "megatron-core")) | {"vllm": ", ".join(sorted(versions))}
    click.echo("\n".join(f"{key}: {value}" for key, value in about.items()) + "\n")
    titles = ("family", "export", "positions", "vLLM off by", "transformers off by", "same greedy tokens", "result")
    click.echo(table(titles, cells))
    if wrong := [f"{cell[0]} in {cell[1]} {cell[-1]}" for cell in cells if cell[-1] != "agrees"]:
        raise click.ClickException("; ".join(wrong))


if __name__ == "__main__":
    main()

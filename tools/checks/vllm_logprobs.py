#!/usr/bin/env python3
"""What vLLM says of token sequences: the half of vllm_check.py that runs in vLLM's own environment.

Reads {"prompts": [[id, ...], ...], "new_tokens": n} and writes, for each prompt, {"tokens": [n ids, greedily chosen],
"logprobs": [a row of the whole vocabulary for every token but the first of the prompt]}.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt, __version__


def rows(positions: Iterable[Mapping[int, Any]]) -> list[list[float]]:
    """[positions, vocabulary]"""
    return [[position[token].logprob for token in range(len(position))] for position in positions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "request", "output"):
        parser.add_argument(name, type=Path)
    # "auto" would compute in half precision where the file is float32.
    parser.add_argument("dtype")
    given = parser.parse_args()
    request = json.loads(given.request.read_text(encoding="utf-8"))
    model = LLM(
        model=str(given.model),
        dtype=given.dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_logprobs=-1,
        generation_config="vllm",
    )
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in request["prompts"]]
    greedy = SamplingParams(
        temperature=0, max_tokens=request["new_tokens"], ignore_eos=True, logprobs=-1, prompt_logprobs=-1
    )
    answers = [
        {
            "tokens": list(answer.outputs[0].token_ids),
            "logprobs": rows([*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]),
        }
        for answer in model.generate(prompts, greedy)
    ]
    given.output.write_text(json.dumps({"version": __version__, "answers": answers}), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The tool that holds vLLM against transformers, without vLLM: it must tell what differs."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch


@pytest.fixture(scope="module")
def tool() -> Any:
    return importlib.import_module("tools.checks.vllm_check")


@pytest.fixture(scope="module")
def model(tool: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tool.exported(tmp_path_factory.mktemp("vllm"), "qwen2_yarn", "float32")


def greedy(tool: Any, model: Path, request: dict[str, Any]) -> list[dict[str, Any]]:
    """What a faithful vLLM answers."""
    found = []
    for prompt in request["prompts"]:
        ids = list(prompt)
        for _ in range(request["new_tokens"]):
            (row,) = tool.logprobs(model, [[*ids, 0]], torch.float32)
            ids.append(int(row[-1].argmax()))
        (row,) = tool.logprobs(model, [ids], torch.float32)
        found.append({"tokens": ids[len(prompt) :], "logprobs": row.tolist()})
    return found


def test_the_same_agrees_and_what_differs_is_told(tool: Any, model: Path) -> None:
    request = {"prompts": [[5, 6, 7], list(range(2, 90))], "new_tokens": 2}
    answers = greedy(tool, model, request)
    found = tool.compare(model, "float32", request, answers)
    assert (found.positions, found.tokens, found.same_tokens) == (4 + 89, 4, 4)
    assert found.vllm < 1e-5 and found.transformers == 0 and not found.problem("float32")
    answers[1]["logprobs"][70][3] += 2e-4
    assert "more than 1.0e-04" in tool.compare(model, "float32", request, answers).problem("float32")
    answers[1]["logprobs"][70][3] = float("nan")
    assert tool.compare(model, "float32", request, answers).problem("float32")
    assert replace(found, same_tokens=3).problem("float32") == "other tokens"
    rounded = tool.compare(model, "bfloat16", request, answers[:1] + greedy(tool, model, request)[1:])
    assert rounded.transformers > 0 and not rounded.problem("bfloat16")
    assert replace(rounded, vllm=3 * rounded.transformers).problem("bfloat16")


def test_a_failure_of_vllm_is_the_tools(tool: Any, model: Path) -> None:
    with pytest.raises(click.ClickException, match="No module named 'vllm'"):
        tool.ask_vllm(Path(sys.executable), model, "float32", tool.asked())

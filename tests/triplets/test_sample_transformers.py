"""`data sample` with a model in this process: a tiny random one, made here."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_solopo import cpu_features
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.generate import transformers
from megatron_solopo.generate.journal import read_offsets
from megatron_solopo.generate.transformers import load_transformers_model
from megatron_solopo.triplets.sample import sample
from megatron_solopo.triplets.settings import SampleSettings
from tests.triplets.context_files import context, write_lines
from tests.triplets.musique_example import load_script


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    script = load_script()
    tokenizer = script.make_tokenizer()
    tokenizer.save_pretrained(path)
    made = script.make_model(tokenizer)
    # Settings that would change the distribution if they were taken over.
    made.generation_config.update(do_sample=True, top_k=1, repetition_penalty=5.0)
    made.save_pretrained(path)
    return path


def run(model, folder, rows, **changes) -> list[dict]:
    values = {"num_samples": 3, "samples_per_request": 2, "max_tokens": 12}
    contexts = write_lines(folder / "contexts.jsonl", rows)
    sample(SampleSettings(contexts=contexts, output=folder / "responses.jsonl", model=str(model), **values | changes))
    return [json.loads(response.model_dump_json()) for _, response in read_offsets(folder / "responses.jsonl")]


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_samples_are_the_same_after_a_restart_and_differ_among_themselves(model, chat, tmp_path) -> None:
    rows = [context(number, chat=chat) for number in range(3)]
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    whole = run(model, tmp_path / "whole", rows)
    assert Counter(each["question_id"] for each in whole) == {"q0": 3, "q1": 3, "q2": 3}
    assert len({each["text"] for each in whole}) == 9
    assert {each["finish_reason"] for each in whole} <= {"length", "stop"} and whole[0]["seed"] != whole[3]["seed"]
    # Killed behind the first request of the second question.
    lines = (tmp_path / "whole" / "responses.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut" / "responses.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:20])
    assert run(model, tmp_path / "cut", rows) == whole


def test_the_distribution_is_the_models_at_the_temperature(model, tmp_path) -> None:
    """First tokens of many samples against the softmax, at the temperature asked for and without top_k."""
    rows = [context(0, response_tokens=600)]
    drawn = run(model, tmp_path, rows, num_samples=4000, samples_per_request=500, max_tokens=1, temperature=0.15)
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode(rows[0]["prompt_short"], add_special_tokens=True)
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([ids])).logits[0, -1]
    expected = torch.softmax(logits.double() / 0.15, dim=-1)
    likeliest = expected.topk(5)
    counted = Counter(each["text"] for each in drawn)
    assert likeliest.values[0] < 0.9  # else top_k=1 would pass
    for token, share in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True):
        error = 4 * (share * (1 - share) / 4000) ** 0.5
        text = tokenizer.decode([token]) if token != tokenizer.eos_token_id else ""
        assert abs(counted[text] / 4000 - share) < error, (text, share, counted[text])


def test_the_dtype_is_the_one_asked_for(model, tmp_path, monkeypatch, capsys) -> None:
    """Answers of another dtype are not put behind the first ones."""
    loaded = []

    def load(path: Path, dtype: str) -> Any:
        loaded.append(load_transformers_model(path, dtype))
        return loaded[-1]

    monkeypatch.setattr(transformers, "load_transformers_model", load)
    monkeypatch.setattr(cpu_features, "has_bfloat16_kernels", lambda: False)
    for dtype, found in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        (tmp_path / dtype).mkdir()
        run(model, tmp_path / dtype, [context(0)], dtype=dtype)
        assert loaded[-1].dtype is found
        is_told = "--dtype float32 is several times as fast" in capsys.readouterr().err
        assert is_told is (found is torch.bfloat16 and not torch.cuda.is_available())
    with pytest.raises(UserError, match="was begun with dtype bfloat16, not without"):
        run(model, tmp_path / "bfloat16", [context(0)])


def test_the_user_may_ask_for_the_cpu_beside_a_gpu(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MEGATRON_SOLOPO_DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    drawn = run(model, tmp_path, [context(0)])
    assert len(drawn) == 3


def test_an_end_token_ends_a_response_and_is_not_in_it(model, tmp_path) -> None:
    tokenizer = load_tokenizer(model)
    # Without the last norm's weights every logit is 0: a draw from 4,096 equal tokens, 100 of which are ends.
    uniform = AutoModelForCausalLM.from_pretrained(model)
    torch.nn.init.zeros_(uniform.model.norm.weight)
    ends = list(range(300, 400))
    uniform.generation_config.eos_token_id = ends
    ended = tmp_path / "ended"
    uniform.save_pretrained(ended)
    load_script().make_tokenizer().save_pretrained(ended)
    rows = [context(0, response_tokens=600)]
    responses = run(ended, tmp_path, rows, num_samples=100, max_tokens=20, samples_per_request=50)
    stopped = [each for each in responses if each["finish_reason"] == "stop"]
    # 1 - (1 - 101 / 4096)**20 of 100: about 39.
    assert 22 <= len(stopped) <= 56
    shorter, whole = (
        sum(len(each["text"]) for each in some) / len(some)
        for some in (stopped, [each for each in responses if each["finish_reason"] == "length"])
    )
    assert shorter < 0.75 * whole
    assert not any(tokenizer.decode([tokenizer.eos_token_id]) in each["text"] for each in responses)


def test_a_directory_without_a_model_is_refused(tokenizer_path, tmp_path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(tokenizer_path, adapter)
    (adapter / "adapter_config.json").write_text("{}")
    for path, part in ((tokenizer_path, "holds no config.json"), (adapter, "holds an adapter of PEFT")):
        with pytest.raises(UserError, match=part) as error:
            run(path, tmp_path, [context(0)])
        assert "\n" not in str(error.value)

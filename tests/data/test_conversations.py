"""Conversations by the templates of tests/inputs: tokens and masks against `apply_chat_template`, or a refusal.

Every template marks what the assistant generates with {% generation %}, so that transformers gives a mask of its own.
"""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.errors import UserError
from tests.data.chat_templates import assistant
from tests.data.conversations import ROWS, TEMPLATES, TOOLS, call, row, write_tokenizer
from tests.data.sample_rows import prepare, write_rows

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "data.md"
LOST = "leaves out text of an answer"
EDITED = "chosen: the chat template edits earlier turns, so prompt and response do not concatenate"
REFUSED = {
    **{("smollm2", kind): "leaves out text of a" for kind in ROWS if kind != "turns"},
    **{
        (name, kind): LOST
        for name in ("llama_3", "qwen2_5", "mistral", "deepseek_v3")
        for kind in ("thoughts", "last_thought")
    },
    # It drops the thought before a call once an answer follows.
    ("gpt_oss", "thoughts"): EDITED,
    # The last answer alone ends with <|return|>.
    ("gpt_oss", "turns"): EDITED,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write_tokenizer(root / name, name) for name in TEMPLATES}


def prepared_row(tmp_path, example, tokenizer, **options):
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    manifest = prepare(write_rows(tmp_path / "rows.jsonl", [example]), out, tokenizer, **options)
    return manifest, load_prepared(out).train[0]


def of_transformers(tokenizer, example, side, answer, **arguments):
    """Tokens and mask of the whole conversation."""
    found = AutoTokenizer.from_pretrained(tokenizer).apply_chat_template(
        example[side] + example[answer],
        tools=example.get("tools"),
        return_dict=True,
        return_assistant_tokens_mask=True,
        **arguments,
    )
    return found["input_ids"], [bool(counts) for counts in found["assistant_masks"]]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_mask_are_those_of_transformers(tokenizers, tmp_path, name, kind):
    example = ROWS[kind]
    if cause := REFUSED.get((name, kind)):
        with pytest.raises(UserError) as caught:
            prepared_row(tmp_path, example, tokenizers[name])
        assert cause in str(caught.value) and "\n" not in str(caught.value)
        return
    manifest, found = prepared_row(tmp_path, example, tokenizers[name])
    if name == "deepseek_v3":  # it joins the text of arguments
        example = with_text_arguments(example)
    for side in ("prompt_short", "prompt_long"):
        for answer in ("chosen", "rejected"):
            tokens, mask = of_transformers(tokenizers[name], example, side, answer)
            assert found[side] + found[answer] == tokens
            assert found.get(f"{answer}_mask", [True] * len(found[answer])) == mask[len(found[side]) :]
    several = kind != "history"
    assert ("chosen_mask" in found) == several == bool(manifest.counted)
    if several:
        assert manifest.counted["chosen"].max == sum(found["chosen_mask"]) < len(found["chosen"])
    assert not manifest.effects


THINKING = {"reasoning_content": "Which one?"}


@pytest.mark.parametrize(
    ("example", "options", "written", "before"),
    [
        # A server ends the thought in the prompt, and the template takes it out of earlier turns.
        (ROWS["tools"], {"enable_thinking": False}, "<tool_call>", "<think>"),
        # A thought is dropped once the user has asked again.
        (
            row(
                ROWS["turns"]["prompt_short"],
                [assistant("Where?") | THINKING, *ROWS["turns"]["chosen"][1:]],
            ),
            {},
            "Where?",
            "<think>",
        ),
    ],
)
def test_a_template_that_edits_earlier_turns_is_refused_by_row(tokenizers, tmp_path, example, options, written, before):
    path = write_rows(tmp_path / "rows.jsonl", [ROWS["history"], example | {"id": "y"}])
    with pytest.raises(UserError) as caught:
        prepare(path, tmp_path / "out", tokenizers["qwen3"], num_proc=1, **{"chat_template_kwargs": options})
    message = str(caught.value)
    assert f"1 of 2 rows cannot be tokenized by {tokenizers['qwen3']}: line 2: {EDITED}" in message
    assert (
        re.search(f"as '[^']*{written}.* once later turns follow, and '[^']*{before}", message) and "\n" not in message
    )
    assert not (tmp_path / "out").exists()


def test_a_template_that_joins_text_gets_the_text_of_the_row(tokenizers, tmp_path):
    calling = call("Turin")
    calling["tool_calls"][0]["function"]["arguments"] = '{"place":   "Turin"}'
    example = row(ROWS["tools"]["prompt_short"], [calling, *ROWS["tools"]["chosen"][1:]], tools=TOOLS)
    written = {}
    for name in ("deepseek_v3", "qwen2_5"):
        _, found = prepared_row(tmp_path, example, tokenizers[name])
        written[name] = AutoTokenizer.from_pretrained(tokenizers[name]).decode(found["chosen"])
    assert '\n```json\n{"place":   "Turin"}\n```' in written["deepseek_v3"]
    assert '"arguments": {"place": "Turin"}}' in written["qwen2_5"]


def test_the_rows_of_the_guide_are_prepared(tokenizers, tmp_path):
    section = GUIDE.read_text(encoding="utf-8").partition("### Conversations and tools")[2].partition("\n### ")[0]
    rows = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", section, re.DOTALL)]
    decoded = []
    for example in rows:
        _, found = prepared_row(tmp_path, example, tokenizers["qwen2_5"])
        mask = found.get("chosen_mask", [True] * len(found["chosen"]))
        counted = [token for token, counts in zip(found["chosen"], mask, strict=True) if counts]
        decoded.append(AutoTokenizer.from_pretrained(tokenizers["qwen2_5"]).decode(counted))
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "Turin"}}\n</tool_call><|im_end|>\n'
    assert decoded == [call + "Yes, 28 degrees.<|im_end|>\n", "Hello.<|im_end|>\n"]


def with_text_arguments(example):
    def formed(message):
        if "tool_calls" not in message:
            return message
        (one,) = message["tool_calls"]
        function = one["function"] | {"arguments": json.dumps(one["function"]["arguments"])}
        return message | {"tool_calls": [one | {"function": function}]}

    names = ("prompt_short", "prompt_long", "chosen")
    return example | {name: [formed(message) for message in example[name]] for name in names}

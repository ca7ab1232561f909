"""Conversations by chat templates: tokens and masks against `apply_chat_template`, or a refusal.

The templates are those of tests/inputs, and published ones that TRL ships, read from the installed package. Most mark
what the assistant generates with {% generation %}, so that transformers gives a mask of its own.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_solopo.data.end_tokens import end_tokens
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.data.rows import parse_row
from megatron_solopo.data.template_effects import MEANINGS
from megatron_solopo.data.tokenize_row import tokenize_row
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.errors import UserError
from tests.data.chat_templates import assistant, system
from tests.data.chat_templates import write_tokenizer as write_tokenizer_of_turns
from tests.data.conversations import QUESTION, ROWS, TEMPLATES, TOOLS, call, result, row, with_template, write_tokenizer
from tests.data.sample_rows import prepare, write_rows

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "data.md"
TRL = find_spec("trl")
needs_trl = pytest.mark.skipif(TRL is None, reason="TRL is not installed")
EDITED = "chosen: the chat template edits earlier turns, so prompt and response do not concatenate"
OPENED = "the chat template begins every answer with '<think>"
NO_CONTENT = 'a message with tool_calls has no content: write "content": "", or use another template'
# Nothing helps: these write no call beside an empty content either, and transformers leaves out one that is null.
NO_CALL = "refuses the messages: 'dict object' has no attribute 'content'"
ALTERNATE = "Conversation roles must alternate"
LOST, LOST_PROMPT = "answer_text", "prompt_text"
THOUGHTS = {"thoughts", "last_thought"}
CALLS = {"history", "tools", "two_calls", *THOUGHTS}
# By template: kinds of rows that are refused, and why.
REFUSED: dict[str, dict[str, set[str]]] = {
    **{name: {LOST: THOUGHTS} for name in TEMPLATES},
    "qwen3": {},
    "smollm2": {LOST: CALLS - {"history"}, LOST_PROMPT: {"history"}},
    # It drops the thought before a call once an answer follows. The last answer alone ends with <|return|>.
    "gpt_oss": {EDITED: {"thoughts", "turns"}},
}
REFUSED_BY_PUBLISHED: dict[str, dict[str, set[str]]] = {
    "cohere2_training": {ALTERNATE: CALLS},
    "deepseek_r1_distill_training": {NO_CALL: CALLS, EDITED: {"turns"}},
    "deepseekv3": {NO_CONTENT: CALLS, EDITED: {"turns"}},
    "deepseekv3_training": {NO_CONTENT: CALLS, EDITED: {"turns"}},
    "gemma3_training": {ALTERNATE: CALLS},
    "gemma4": {LOST: THOUGHTS},
    "glm4moe_training": {},
    "gptoss": {EDITED: {"turns", "thoughts"}},
    "gptoss_training": {EDITED: {"turns", "thoughts"}},
    "lfm2_v2_training": {LOST: THOUGHTS},
    "llama3_1": {LOST: THOUGHTS},
    "llama3_2": {LOST: THOUGHTS},
    "nemotron_3_nano_training": {
        OPENED: {"history", "thoughts"},
        EDITED: {"tools", "two_calls", "turns", "last_thought"},
    },
    "phi3_training": {NO_CALL: CALLS, EDITED: {"turns"}},
    "qwen2_5_training": {LOST: THOUGHTS},
    "qwen3": {},
    "qwen3_training": {},
    "qwen3_6_training": {},
    "qwen3_instruct_2507_training": {LOST: THOUGHTS},
}


# The tokens that end an answer of the published models; of all others <|im_end|>.
END_OF_SENTENCE = "<\uff5cend\u2581of\u2581sentence\uff5c>"
END_TOKENS = {
    "cohere2_training": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek_r1_distill_training": [END_OF_SENTENCE],
    "deepseekv3": [END_OF_SENTENCE],
    "deepseekv3_training": [END_OF_SENTENCE],
    "gemma3_training": ["<end_of_turn>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "glm4moe_training": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "gptoss_training": ["<|return|>", "<|call|>"],
    "llama3_1": ["<|eot_id|>"],
    "llama3_2": ["<|eot_id|>"],
    "phi3_training": ["<|end|>"],
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write_tokenizer(root / name, name) for name in TEMPLATES}


def prepared_row(tmp_path, example, tokenizer, **options):
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    manifest = prepare(write_rows(tmp_path / "rows.jsonl", [example]), out, tokenizer, **options)
    return manifest, load_prepared(out).train[0]


def tokenized(example, tokenizer, ends):
    """A row's tokens, and "" or why it is refused."""
    read = parse_row(1, json.loads(json.dumps(example)))
    prompts = {side: read.contents[side] for side in ("prompt_short", "prompt_long")}
    answers = {answer: read.contents[answer] for answer in ("chosen", "rejected")}
    try:
        found = tokenize_row(prompts, answers, tokenizer, "chat", ends, read.arguments)
    except UserError as error:
        assert "\n" not in str(error)
        return None, str(error)
    return found, next((each.kind for each in found.effects if MEANINGS[each.kind].is_loss), "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_mask_are_those_of_transformers(tokenizers, name):
    # DeepSeek's joins the text of arguments.
    compare_all(tokenizers[name], REFUSED[name], with_text_arguments if name == "deepseek_v3" else lambda each: each)


@needs_trl
@pytest.mark.parametrize("name", REFUSED_BY_PUBLISHED)
def test_tokens_and_mask_of_published_templates_are_those_of_transformers(tmp_path, name):
    path = with_template(tmp_path, published(name), END_TOKENS.get(name, ["<|im_end|>"]))
    compare_all(path, REFUSED_BY_PUBLISHED[name], lambda each: each)


def published(name):
    return (Path(TRL.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def compare_all(path, expected, as_taken):
    tokenizer, ours = AutoTokenizer.from_pretrained(path), load_tokenizer(path)
    refused: dict[str, set[str]] = {}
    ends = end_tokens(path, ours)
    for kind, example in ROWS.items():
        found, cause = tokenized(example, ours, ends)
        assert NO_CONTENT not in cause or NO_CONTENT in expected
        if cause:
            refused.setdefault(next((each for each in expected if each in cause), cause), set()).add(kind)
            continue
        for side in ("prompt_short", "prompt_long"):
            for answer in ("chosen", "rejected"):
                whole = of_transformers(tokenizer, as_taken(example), side, answer)
                assert found.ids[side] + found.ids[answer] == whole["input_ids"]
                if "assistant_masks" in whole:
                    theirs = [bool(each) for each in whole["assistant_masks"][len(found.ids[side]) :]]
                    check_mask(tokenizer, found.ids[answer], found.masks[answer], theirs)
    assert refused == expected


def of_transformers(tokenizer, example, side, answer):
    """The whole conversation."""
    marks = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template) is not None
    return tokenizer.apply_chat_template(
        example[side] + example[answer],
        tools=example.get("tools"),
        return_dict=True,
        return_assistant_tokens_mask=marks,
    )


def check_mask(tokenizer, tokens, ours, theirs):
    """Both masks are equal but for headers of later turns, which some templates mark. Of the first, none counts."""
    asked, told = (
        tokenizer.apply_chat_template([QUESTION], add_generation_prompt=ask, tokenize=False) for ask in (True, False)
    )
    header = asked.removeprefix(told)
    run: list[int] = []
    for token, mine, other in zip(tokens, ours, theirs, strict=True):
        assert other or not mine
        if other and not mine:
            run.append(token)
        else:
            assert header.endswith(tokenizer.decode(run)) and (mine or not run)
            run = []
    assert any(ours) and not run


@needs_trl
@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill_training", "phi3_training"])
def test_a_call_with_an_empty_content_is_written_or_refused(tmp_path, name):
    path = with_template(tmp_path, published(name), END_TOKENS[name])
    tokenizer, ours = AutoTokenizer.from_pretrained(path), load_tokenizer(path)
    example = row([QUESTION], [assistant("It is.")])
    called = [call("Turin", content=""), result("18")]
    example |= {side: [*example[side], *called] for side in ("prompt_short", "prompt_long")}
    found, cause = tokenized(example, ours, end_tokens(path, ours))
    if name == "deepseekv3":
        assert not cause
        assert '\n```json\n{"place": "Turin"}\n```<' in tokenizer.decode(found.ids["prompt_long"])
        assert tokenizer.decode(found.ids["chosen"]) == f"It is.{END_OF_SENTENCE}"
    else:
        assert cause == LOST_PROMPT


def test_prepare_keeps_the_mask_and_counts_its_tokens(tokenizers, tmp_path):
    manifest, found = prepared_row(tmp_path, ROWS["tools"], tokenizers["qwen3"])
    assert manifest.counted["chosen"].max == sum(found["chosen_mask"]) < len(found["chosen"])
    assert not manifest.effects
    manifest, found = prepared_row(tmp_path, ROWS["history"], tokenizers["qwen3"])
    assert "chosen_mask" not in found and not manifest.counted


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


def test_a_system_message_that_moves_goes_with_one_turn_alone(tmp_path):
    """Mistral's older template writes it into the last user message, if no answer follows."""
    tokenizer = write_tokenizer_of_turns(tmp_path / "tokenizer", "system_in_last_turn", eos_token="</s>")
    (prompt,), turns = ROWS["turns"]["prompt_short"], ROWS["turns"]["chosen"]
    _, found = prepared_row(tmp_path, ROWS["turns"], tokenizer)
    whole = AutoTokenizer.from_pretrained(tokenizer).apply_chat_template([prompt, *turns])["input_ids"]
    assert found["prompt_short"] + found["chosen"] == whole
    start, *ends = [place for place, token in enumerate(found["chosen"]) if not found["chosen_mask"][place]]
    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    assert decode(found["chosen"][start : ends[-1] + 1]) == "[INST] By the Po.[/INST]"
    for answers, cause in ((turns, EDITED), (turns[-1:], "")):
        example = row([system("Be brief."), prompt, *turns[: 3 - len(answers)]], answers)
        if cause:
            with pytest.raises(UserError, match=cause):
                prepared_row(tmp_path, example, tokenizer)
        else:
            _, found = prepared_row(tmp_path, example, tokenizer)
            assert decode(found["prompt_short"]).endswith("[INST] Be brief.\n\nBy the Po.[/INST]")
            assert decode(found["chosen"]) == " Then it is.</s>"


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

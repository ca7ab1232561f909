"""Templates that behave as published ones do, against rows of every kind: the exact text, or a refusal with its cause.

Where the text is accepted it is that of transformers' `apply_chat_template`, except in the two forms that
`data.rendering` derives.
"""

import json
from datetime import datetime

import pytest
from transformers import AutoTokenizer

from megatron_solopo.data import template_clock
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.data.rendering import render_response
from megatron_solopo.data.template_effects import clock_warning
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.errors import UserError
from tests.data.chat_templates import INPUTS, NAMES, ROWS, assistant, row, system, user, write_tokenizer
from tests.data.sample_rows import prepare, write_rows
from tests.data.tiny_tokenizers import write_hugging_face

NO_THOUGHT = "begins every answer with '<think>\\n'"
LEAVES_OUT = "leaves out text of an answer"
NO_END = "does not end with an end token"
SAME = "has the same tokens as chosen: the template leaves out text of an answer; chosen: '<think>"
# Every other pair is accepted and is what transformers renders.
REFUSED = {
    **{("no_end_token", kind): NO_END for kind in ROWS},
    **dict.fromkeys([("think_dropped", "thought"), ("think_dropped", "half_thought")], LEAVES_OUT),
    ("think_dropped", "only_thoughts_differ"): SAME,
    **{
        ("think_opened_and_dropped", kind): NO_THOUGHT
        for kind in ("plain", "system", "several_turns", "outer_white_space")
    },
}
# The template's own text for the whole conversation loses the system message or the thought.
DERIVED = {
    ("system_in_last_turn", "system"): " It is 4.<|im_end|>",
    ("think_opened_and_dropped", "thought"): "two and two\n</think>\n\nIt is 4.<|im_end|>",
    ("think_opened_and_dropped", "only_thoughts_differ"): "two and two\n</think>\n\nIt is 4.<|im_end|>",
    ("think_opened_and_dropped", "half_thought"): "two and two\n</think>\n\nIt is 4.<|im_end|>",
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write_tokenizer(root / name, name) for name in NAMES}


def prepare_rows(tmp_path, rows, tokenizer, **options):
    """The manifest, and the first row as text."""
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    manifest = prepare(write_rows(tmp_path / "rows.jsonl", rows), out, tokenizer, **options)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    first = load_prepared(out).train[0]
    return manifest, {name: loaded.decode(first[name]) for name in manifest.columns}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_template_makes_of_a_row(tokenizers, tmp_path, name, kind):
    example, path = ROWS[kind], tokenizers[name]
    if cause := REFUSED.get((name, kind)):
        with pytest.raises(UserError) as caught:
            prepare_rows(tmp_path, [example], path)
        assert cause in str(caught.value) and "\n" not in str(caught.value)
        return
    manifest, texts = prepare_rows(tmp_path, [example], path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for side in ("prompt_short", "prompt_long"):
        prompt = tokenizer.apply_chat_template(example[side], add_generation_prompt=True, tokenize=False)
        assert texts[side] == prompt
        if (name, kind) not in DERIVED:
            whole = tokenizer.apply_chat_template(example[side] + example["chosen"], tokenize=False)
            assert prompt + texts["chosen"] == whole
    if (name, kind) in DERIVED:
        assert texts["chosen"] == DERIVED[name, kind]
    trims = kind == "outer_white_space" and name in ("system_in_last_turn", "todays_date")
    expected = ({"white_space"} if trims else set()) | ({"clock"} if name == "todays_date" else set())
    assert manifest.effects.keys() == expected


def test_lost_content_can_be_accepted_and_is_counted_and_shown(tokenizers, tmp_path):
    rows = [ROWS["plain"] | {"id": "a"}, ROWS["thought"] | {"id": "b"}, ROWS["thought"] | {"id": "c"}]
    with pytest.raises(UserError, match=r"2 of 3 rows, first b: chosen: .*two and two.* --on-lost-content warn"):
        prepare_rows(tmp_path, rows, tokenizers["think_dropped"])
    manifest, _ = prepare_rows(tmp_path, rows, tokenizers["think_dropped"], on_lost_content="warn", num_proc=2)
    assert manifest.effects["answer_text"].rows == 2
    assert "warning: 2 rows: the template leaves out text of an answer (first b: chosen: " in str(manifest)


@pytest.mark.parametrize("end_tokens", [("</s>",), ("</s>", "<|im_end|>")])
def test_a_turn_must_end_with_an_end_token_of_the_model(tmp_path, end_tokens):
    path = write_tokenizer(tmp_path / "tokenizer", "tools", eos_token="</s>", end_tokens=end_tokens)
    if "<|im_end|>" in end_tokens:
        manifest, texts = prepare_rows(tmp_path, [ROWS["plain"]], path)
        assert texts["chosen"] == "It is 4.<|im_end|>\n" and not manifest.effects
        return
    with pytest.raises(UserError) as caught:
        prepare_rows(tmp_path, [ROWS["plain"]], path)
    message = str(caught.value)
    assert r"first x: chosen ends with " in message and "last token '<|im_end|>' with id 4)" in message
    assert "add its id to eos_token_id in the model's generation_config.json; if there is none" in message
    assert f"(end tokens of {path}: '</s>')" in message
    manifest, _ = prepare_rows(tmp_path, [ROWS["plain"]], path, on_lost_content="warn")
    assert manifest.effects["no_end_token"].rows == 1


def test_a_directory_without_generation_settings_is_named(tokenizers, tmp_path):
    with pytest.raises(UserError, match="so name the model's own directory"):
        prepare_rows(tmp_path, [ROWS["plain"]], tokenizers["no_end_token"])


def test_text_that_ends_generation_inside_an_answer_is_refused(tokenizers, tmp_path):
    rows = [row("It is<|im_end|> 4.", "It is 5.")]
    with pytest.raises(UserError, match=r"has an end token inside, where generation stops .*It is<\|im_end\|> 4"):
        prepare_rows(tmp_path, rows, tokenizers["tools"])
    plain = {"id": "x", "prompt_short": "Q", "prompt_long": "T Q", "chosen": "yes<|im_end|>no", "rejected": "no"}
    with pytest.raises(UserError, match="has an end token inside"):
        prepare_rows(tmp_path, [plain], tokenizers["tools"])


def test_text_that_a_prompt_loses_is_refused(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer", "tools")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = (
        (INPUTS / "chat_template_tools.jinja")
        .read_text()
        .replace("for m in messages", "for m in messages if m.role != 'system'")
    )
    tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match=r"leaves out text of a prompt .*prompt_short: system 'Be brief\.' is not in"):
        prepare_rows(tmp_path, [ROWS["system"]], path)


def test_white_space_at_a_thought_is_the_templates_and_inside_it_must_stay(tokenizers, tmp_path):
    path = tokenizers["think_optional"]
    manifest, texts = prepare_rows(tmp_path, [row("<think>two</think>It is 4.", "No.")], path)
    assert texts["chosen"] == "<think>\ntwo\n</think>\n\nIt is 4.<|im_end|>\n"
    assert manifest.effects.keys() == {"white_space"}
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = tokenizer.chat_template.replace("content.lstrip('\\n')", "content | replace('  ', ' ')")
    tokenizer.save_pretrained(tmp_path / "collapsing")
    with pytest.raises(UserError, match="leaves out text of an answer"):
        prepare_rows(tmp_path, [row("def f():\n    pass", "No.")], str(tmp_path / "collapsing"))


def test_thinking_is_switched_off_for_all_rows_or_for_one(tokenizers, tmp_path):
    path = tokenizers["think_argument"]
    _, given = prepare_rows(tmp_path, [ROWS["plain"]], path, chat_template_kwargs={"enable_thinking": False})
    assert given["prompt_short"].endswith("assistant\n<think>\n\n</think>\n\n")
    assert given["chosen"] == "It is 4.<|im_end|>\n"
    on = ROWS["plain"] | {"chat_template_kwargs": {"enable_thinking": True}}
    manifest, own = prepare_rows(tmp_path, [on], path, chat_template_kwargs={"enable_thinking": False})
    assert own["prompt_short"].endswith("assistant\n") and own["chosen"].startswith("<think>\n\n</think>")
    assert manifest.chat_template_kwargs == {"enable_thinking": False}
    with pytest.raises(
        UserError, match="chosen: has a thought, but the chat template ends prompt_short with a closed one"
    ):
        prepare_rows(tmp_path, [ROWS["thought"]], path, chat_template_kwargs={"enable_thinking": False})


def test_arguments_in_a_row_reach_the_template_or_are_refused(tokenizers, tmp_path):
    rows = [json.loads(line) for line in (INPUTS / "triplets_chat_template_kwargs.jsonl").read_text().splitlines()]
    _, texts = prepare_rows(tmp_path, rows, tokenizers["think_argument"])
    assert texts["prompt_short"].endswith("<think>\n\n</think>\n\n") and texts["chosen"] == "yes<|im_end|>\n"
    with pytest.raises(UserError, match=r"not read tools or arguments of a row \(1 of 1 rows, .*enable_thinking\)"):
        prepare_rows(tmp_path, rows, tokenizers["think_optional"])


def test_tools_in_a_row_reach_the_template_or_are_refused(tokenizers, tmp_path):
    rows = [json.loads(line) for line in (INPUTS / "triplets_tools.jsonl").read_text().splitlines()]
    _, texts = prepare_rows(tmp_path, rows, tokenizers["tools"])
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["tools"])
    prompt = tokenizer.apply_chat_template(
        rows[0]["prompt"], tools=rows[0]["tools"], add_generation_prompt=True, tokenize=False
    )
    assert texts["prompt_short"] == prompt and "Tools: [" in prompt
    with pytest.raises(UserError, match=r"does not read tools or arguments of a row \(1 of 1 rows, first 1: tools\)"):
        prepare_rows(tmp_path, rows, tokenizers["think_optional"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"chat_template_kwargs": {"enable_thinkng": False}}, "does not read enable_thinkng"),
        ({"chat_template_kwargs": {"messages": []}}, "--chat-template-kwargs: 'messages' is no argument of a template"),
    ],
)
def test_arguments_that_nothing_reads_are_refused(tokenizers, tmp_path, options, reason):
    with pytest.raises(UserError, match=reason):
        prepare_rows(tmp_path, [ROWS["plain"]], tokenizers["think_argument"], **options)


def test_plain_text_takes_no_arguments(tokenizers, tmp_path):
    plain = {"id": "x", "prompt_short": "Q", "prompt_long": "T Q", "chosen": "yes", "rejected": "no"}
    with pytest.raises(UserError, match="needs a chat template, but the prompts are plain text"):
        prepare_rows(tmp_path, [plain], tokenizers["tools"], chat_template_kwargs={"tone": "kind"})
    with pytest.raises(UserError, match=r"does not read tools or arguments of a row .*first x: tone"):
        prepare_rows(tmp_path, [plain | {"chat_template_kwargs": {"tone": "kind"}}], tokenizers["tools"])


def test_a_template_that_writes_the_date_is_named_and_an_argument_fixes_it(tokenizers, tmp_path, monkeypatch):
    path = tokenizers["todays_date"]
    rows = [json.loads(line) for line in (INPUTS / "triplets_chat.jsonl").read_text().splitlines()]
    fingerprints, fixed = [], {"date_string": "26 Jul 2024"}
    for day in (1, 2):
        monkeypatch.setattr(template_clock, "_started", datetime(2026, 3, day))
        manifest, texts = prepare_rows(tmp_path, rows, path)
        assert f"Today Date: 0{day} Mar 2026" in texts["prompt_short"]
        assert manifest.clock.endswith(f"""--chat-template-kwargs '{{"date_string": "0{day} Mar 2026"}}'""")
        assert manifest.effects["clock"].rows == len(rows) and "warning: the chat template writes" in str(manifest)
        again, texts = prepare_rows(tmp_path, rows, path, chat_template_kwargs=fixed)
        assert "Today Date: 26 Jul 2024" in texts["prompt_short"] and not again.effects and not again.clock
        fingerprints.append((manifest.fingerprint, again.fingerprint))
    assert fingerprints[0][0] != fingerprints[1][0] and fingerprints[0][1] == fingerprints[1][1]


def test_a_date_that_no_argument_replaces_is_named_too(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer", "tools")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(path)
    assert "none of its arguments fixes it" in clock_warning(load_tokenizer(path))


def test_a_thought_that_is_opened_twice_or_differently_is_refused(tokenizers):
    tokenizer = load_tokenizer(tokenizers["think_opened_and_dropped"])
    for answer in (
        "<think>\nfirst <think>\nsecond\n</think>\n\nYes.",
        "<think>two</think>Yes.",
    ):
        with pytest.raises(UserError, match="this answer has no thought in that form"):
            render_response([user("Q")], [assistant(answer)], tokenizer)
    answer = "<think>\n\n</think>\n\nYes."
    assert render_response([user("Q")], [assistant(answer)], tokenizer) == "\n</think>\n\nYes.<|im_end|>"


def test_a_system_message_that_moves_is_in_the_prompt(tokenizers):
    tokenizer = load_tokenizer(tokenizers["system_in_last_turn"])
    prompt = [system("Be brief."), user("Hi"), assistant("Hello"), user("What is 2+2?")]
    assert render_response(prompt, [assistant(" It is 4. ")], tokenizer) == " It is 4.<|im_end|>"


def test_a_template_that_ignores_add_generation_prompt_is_told(tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = str(write_hugging_face(tmp_path / "tokenizer", chat_template=template))
    manifest, texts = prepare_rows(tmp_path, [ROWS["plain"], ROWS["several_turns"] | {"id": "y"}], tokenizer)
    assert texts["chosen"].startswith("<|im_start|>assistant\n")
    assert manifest.effects.keys() == {"header_in_answer"} and manifest.effects["header_in_answer"].rows == 2
    assert "note: 2 rows: the template ignores add_generation_prompt" in str(manifest)

"""Arguments of the chat template and tools: from `data build` or a row to every prompt, request and triplet."""

import json

import pytest

from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.triplets.build import build
from megatron_solopo.triplets.sample import sample
from megatron_solopo.triplets.select import select
from megatron_solopo.triplets.settings import BuildSettings, SampleSettings, SelectSettings
from tests.data.chat_templates import write_tokenizer
from tests.data.sample_rows import prepare
from tests.generate.completion_server import completion_server
from tests.triplets.context_files import context, response, write_lines
from tests.triplets.musique_example import first_lines, read, write

OFF = {"enable_thinking": False}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("thinking") / "tokenizer", "think_argument")


def test_build_measures_with_the_arguments_and_writes_them_into_the_rows(thinking, tmp_path):
    source, rows = write(tmp_path / "few.jsonl", first_lines(2)), {}
    for name, kwargs in (("on", {}), ("off", OFF)):
        output = tmp_path / f"{name}.jsonl"
        asked = BuildSettings(
            input=source,
            output=output,
            tokenizer=thinking,
            template="chat",
            long_tokens="4000",
            response_tokens=100,
            chat_template_kwargs=kwargs,
        )
        build(asked)
        rows[name] = read(output)[0]
    assert "chat_template_kwargs" not in rows["on"] and rows["off"]["chat_template_kwargs"] == OFF
    tokenizer = load_tokenizer(thinking)
    closed = len(tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False))
    assert rows["off"]["short_tokens"] - rows["on"]["short_tokens"] == closed


def test_build_refuses_arguments_that_the_template_does_not_read(thinking, tmp_path):
    source = write(tmp_path / "few.jsonl", first_lines(2))
    asked = {"input": source, "output": tmp_path / "o.jsonl", "tokenizer": thinking, "template": "chat"}
    with pytest.raises(UserError, match="--chat-template-kwargs: the chat template does not read thinking"):
        build(BuildSettings(**asked, chat_template_kwargs={"thinking": False}))
    with pytest.raises(UserError, match="needs a chat template"):
        build(BuildSettings(**asked | {"template": "plain"}, chat_template_kwargs=OFF))


def test_build_takes_a_template_that_demands_a_thought(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", "think_opened_and_dropped")
    source = write(tmp_path / "few.jsonl", first_lines(2))
    asked = {"input": source, "output": tmp_path / "o.jsonl", "tokenizer": tokenizer, "template": "chat"}
    assert build(BuildSettings(**asked, long_tokens="4000")).rows_written


def test_a_servers_requests_have_the_arguments_and_tools_and_a_rows_own_win(tmp_path):
    rows = [context(0, chat=True), context(1, chat=True, chat_template_kwargs={"enable_thinking": True}, tools=TOOLS)]
    contexts = write_lines(tmp_path / "contexts.jsonl", rows)
    output = tmp_path / "responses.jsonl"
    with completion_server() as server:
        asked = {"contexts": contexts, "output": output, "model": "tiny", "server": server.url, "num_samples": 1}
        sample(SampleSettings(**asked, chat_template_kwargs={"enable_thinking": False, "tone": "kind"}))
    sent = {each.prompt: each.body for each in server.answered()}
    assert sent["short 0"]["chat_template_kwargs"] == {"enable_thinking": False, "tone": "kind"}
    assert sent["short 1"]["chat_template_kwargs"] == {"enable_thinking": True, "tone": "kind"}
    assert "tools" not in sent["short 0"] and sent["short 1"]["tools"] == TOOLS
    with pytest.raises(UserError, match="was begun with other chat_template_kwargs"), completion_server() as server:
        sample(SampleSettings(**asked | {"server": server.url}, chat_template_kwargs=OFF))


def test_text_has_no_template_that_could_read_arguments(tmp_path):
    contexts = write_lines(tmp_path / "contexts.jsonl", [context(0)])
    asked = {"contexts": contexts, "output": tmp_path / "r.jsonl", "model": "tiny", "server": "http://localhost:9/v1"}
    with pytest.raises(UserError, match=r"contexts.jsonl:1: the prompt is plain text, so no chat template reads"):
        sample(SampleSettings(**asked, chat_template_kwargs=OFF))


def test_select_takes_the_arguments_of_the_responses_and_hands_them_to_prepare(thinking, tmp_path):
    contexts = write_lines(tmp_path / "contexts.jsonl", [context(0, chat=True)])
    texts = ["So the answer is: Paris.", "So the answer is: Rome."]
    header = {"journal": {"chat_template_kwargs": OFF}}
    responses = tmp_path / "responses.jsonl"
    write_lines(responses, [header, *(response(0, index, text) for index, text in enumerate(texts))])
    with pytest.raises(UserError, match="sampled from other short contexts"):
        select(selection(contexts, responses, thinking))
    write_lines(responses, [response(0, index, text) for index, text in enumerate(texts)])
    select(selection(contexts, responses, thinking))
    assert "chat_template_kwargs" not in read(tmp_path / "triplets.jsonl")[0]
    with completion_server() as server:
        asked = {"contexts": contexts, "output": tmp_path / "s.jsonl", "model": "m", "server": server.url}
        sample(SampleSettings(**asked, num_samples=1, chat_template_kwargs=OFF))
    with (tmp_path / "s.jsonl").open("a") as stream:
        stream.writelines(json.dumps(response(0, index + 1, text)) + "\n" for index, text in enumerate(texts))
    select(selection(contexts, tmp_path / "s.jsonl", thinking))
    (row,) = read(tmp_path / "triplets.jsonl")
    assert row["chat_template_kwargs"] == OFF
    prepare(tmp_path / "triplets.jsonl", tmp_path / "prepared", thinking)
    first = load_prepared(tmp_path / "prepared").train[0]
    tokenizer = load_tokenizer(thinking)
    assert tokenizer.decode(first["prompt_short"]).endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(first["chosen"]) == "So the answer is: Paris.<|im_end|>\n"


def selection(contexts, responses, tokenizer):
    output = contexts.with_name("triplets.jsonl")
    return SelectSettings(contexts=contexts, responses=responses, output=output, tokenizer=tokenizer, overwrite=True)

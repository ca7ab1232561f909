"""The arguments of tool calls as a reader takes them."""

import json

import pytest

from megatron_solopo.data.tool_calls import arguments_as_objects, arguments_as_text, needs_content, takes_text
from tests.data.conversations import call, result

OBJECT, TEXT = {"place": "Turin"}, '{"place":"Turin"}'


def with_arguments(arguments):
    message = call("Turin")
    message["tool_calls"][0]["function"]["arguments"] = arguments
    return [message, result("18")]


@pytest.mark.parametrize("arguments", [OBJECT, TEXT])
def test_arguments_are_objects_or_text(arguments):
    messages = with_arguments(arguments)
    assert arguments_as_objects(messages) == with_arguments(OBJECT)
    text = TEXT if arguments is TEXT else json.dumps(OBJECT)
    assert arguments_as_text(messages) == with_arguments(text)
    assert messages == with_arguments(arguments), "the row is not changed"


def of_call(messages):
    """As in a trial's last message."""
    return messages[-1]["tool_calls"][0]["function"]["arguments"]


def joined(messages):
    return of_call(messages) if isinstance(of_call(messages), str) else ""


@pytest.mark.parametrize(
    ("render", "expected"),
    [
        (lambda messages: json.dumps(of_call(messages)), False),
        (joined, True),
        (lambda messages: str(of_call(messages)), True),
        (lambda messages: json.dumps(of_call(messages)) if isinstance(of_call(messages), dict) else "", False),
        (lambda messages: "", False),
        # Each writes calls beside one kind of content only, as Gemma 4's does.
        (lambda messages: joined(messages) if messages[-1]["content"] is None else "", True),
        (lambda messages: "{qxqz:<vrrk>}" if messages[-1]["content"] is not None else "", False),
    ],
)
def test_what_a_template_takes_is_found_by_trial(render, expected):
    assert takes_text(render) == expected


@pytest.mark.parametrize(
    ("render", "expected"),
    [
        (lambda messages: joined(messages) if messages[-1]["content"] is not None else "", True),
        (lambda messages: json.dumps(of_call(messages)) if messages[-1]["content"] is not None else "", True),
        (lambda messages: joined(messages) if messages[-1]["content"] is None else "", False),
        (lambda messages: joined(messages), False),
        # Phi-3 writes no call at all.
        (lambda messages: messages[-1]["content"] or "", False),
    ],
)
def test_a_content_is_asked_for_where_it_shows_the_call(render, expected):
    assert needs_content(render) == expected

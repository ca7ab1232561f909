"""A server that reads less than the prompt is found by its own count of tokens."""

import random

import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.generate.model import Request
from megatron_solopo.generate.prompt_check import PromptCheck

URL = "http://localhost:11434/v1"
CHAT = [{"role": "user", "content": "?"}]


def request(tokens: int | None, prompt: object = "?", question_id: str = "q1") -> Request:
    return Request(question_id, prompt, (0,), 1, prompt_tokens=tokens)


def test_a_cut_prompt_is_told_with_both_numbers_and_the_way_out() -> None:
    with pytest.raises(UserError) as error:
        PromptCheck(URL, own_tokenizer=True).check(request(4096), 128)
    assert str(error.value).startswith(f"--server {URL}: read 128 of the 4096 tokens of a prompt (q1)")
    assert "num_ctx" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "sent", "read"),
    [
        ("?", 4096, 4096),
        ("?", 4096, 4094),  # without the special tokens
        ("?", 4096, 4200),
        (CHAT, 4096, 4040),  # a chat template without the default system message
        ("?", 4096, None),  # the server does not say
        ("?", None, 5),  # nobody counted
    ],
)
def test_a_whole_prompt_passes(prompt, sent, read) -> None:
    PromptCheck(URL, own_tokenizer=True).check(request(sent, prompt), read)


@pytest.mark.parametrize(("prompt", "read"), [("?", 4093), (CHAT, 4031)])
def test_a_small_cut_is_found_where_the_tokenizer_is_the_models(prompt, read) -> None:
    with pytest.raises(UserError, match="cuts prompts"):
        PromptCheck(URL, own_tokenizer=True).check(request(4096, prompt), read)


def test_a_cut_is_found_with_another_tokenizer_too() -> None:
    """Its counts differ by a factor. Prompts of different lengths that all become equally long were cut."""
    check = PromptCheck(URL, own_tokenizer=False)
    for sent in (1000, 3000, 5000):
        check.check(request(sent), round(0.7 * sent))
    for sent in (6000, 7000):
        check.check(request(sent, question_id=f"q{sent}"), 4096)
    with pytest.raises(UserError, match=r"read 4096 of the 8000 tokens .* tokenizer of its model in data build"):
        check.check(request(8000), 4096)
    with pytest.raises(UserError, match="read 90 of the 1000 tokens"):
        check.check(request(1000), 90)


def test_counts_of_another_tokenizer_that_happen_to_be_equal_are_no_cut() -> None:
    check = PromptCheck(URL, own_tokenizer=False)
    draw = random.Random(0)
    for number in range(20_000):
        sent = draw.randint(2000, 6000)
        check.check(request(sent, question_id=str(number)), round(sent * draw.uniform(0.25, 0.95)))


def test_counts_of_another_tokenizer_for_prompts_of_one_length_are_no_cut() -> None:
    check = PromptCheck(URL, own_tokenizer=False)
    draw = random.Random(0)
    for number in range(20_000):
        check.check(request(4096, question_id=str(number)), round(draw.gauss(3500, 20)))


def test_a_cut_of_prompts_of_one_length_is_found_with_another_tokenizer() -> None:
    check = PromptCheck(URL, own_tokenizer=False)
    for number in range(4):
        check.check(request(4096, question_id=str(number)), 2048)
        check.check(request(4096, question_id=str(number)), 2048)
    with pytest.raises(UserError, match="read 2048 of the 4096 tokens"):
        check.check(request(4096, question_id="4"), 2048)

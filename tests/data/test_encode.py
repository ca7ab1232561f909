import pytest

from megatron_solopo.data.encode import tokenize_row
from megatron_solopo.errors import UserError


class UnknownOnly:
    """A tokenizer that knows no word of the alphabet's second half and drops them."""

    eos_token_id = 0

    def encode(self, text, *, add_special_tokens):
        return [ord(character) for character in text if character < "m"]

    def encode_continuation(self, text):
        return self.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [("xyz", "ab", "chosen: tokenizes to nothing"), ("abz", "ab", "rejected: has the same tokens as chosen")],
)
def test_responses_that_tokenize_to_nothing_or_alike(chosen, rejected, reason):
    responses = {"chosen": chosen, "rejected": rejected}
    with pytest.raises(UserError, match=reason):
        tokenize_row({"prompt_short": "a"}, responses, UnknownOnly(), "plain")

import pytest

from megatron_solopo.data.encode import tokenize_row, tokenize_rows
from megatron_solopo.errors import UserError
from tests.data.sample_rows import triplet, write_rows


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


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_fault_of_the_calling_code_is_no_problem_of_a_row(num_proc, hugging_face, tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [triplet(0), triplet(1)])
    with pytest.raises(KeyError, match="prompt"):  # the rows are triplets, not pairs
        tokenize_rows(path, "pair", hugging_face, "", "plain", num_proc=num_proc, work=tmp_path / "work")

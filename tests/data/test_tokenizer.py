import json

import pytest
import tokenizers as tokenizers_library
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_solopo.data import tokenizer_contradictions, tokenizer_file
from megatron_solopo.data.tokenize_row import tokenize_row
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.errors import UserError
from tests.data.tiny_tokenizers import ALPHABET, CHATML, STRICT, write_hugging_face, write_sentencepiece

TEXT = st.text(alphabet=ALPHABET, min_size=1, max_size=40)
STYLES = ("byte_level", "metaspace", "prepend", "sentencepiece")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    paths = [write_hugging_face(root / style, style=style) for style in STYLES[:3]]
    paths.append(write_sentencepiece(root / "sentencepiece.model"))
    return {path.stem: load_tokenizer(path) for path in paths}


@pytest.mark.parametrize("style", STYLES)
@settings(deadline=None, max_examples=150)
@given(prompt=TEXT, response=TEXT)
def test_prompt_and_response_tokens_join_to_the_text(tokenizers, style, prompt, response):
    tokenizer = tokenizers[style]
    if style == "metaspace":
        prompt = "a" + prompt  # this pre-tokenizer adds no second space, so its decoder loses a leading one
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    response_ids = tokenizer.encode_continuation(response)
    assert tokenizer.decode(prompt_ids) == prompt
    assert tokenizer.decode(prompt_ids + response_ids) == prompt + response
    assert all(0 <= token < tokenizer.vocab_size for token in prompt_ids + response_ids)


@settings(deadline=None, max_examples=50)
@given(prompt=st.text(max_size=30), response=st.text(max_size=30))
def test_byte_level_joins_any_unicode(tokenizers, prompt, response):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode(prompt, add_special_tokens=False) + tokenizer.encode_continuation(response)
    assert tokenizer.decode(ids) == prompt + response


@pytest.mark.parametrize("response", ["Turin", "the river Po", ".", "..", "0a(A"])
@pytest.mark.parametrize("style", ["metaspace", "prepend", "sentencepiece"])
def test_continuation_has_no_space_of_its_own(tokenizers, style, response):
    tokenizer = tokenizers[style]
    alone = tokenizer.encode(response, add_special_tokens=False)
    assert tokenizer.encode_continuation(response) != alone
    assert tokenizer.encode_continuation(" " + response) == alone


def test_sentencepiece_that_collapses_spaces_keeps_the_one_at_the_boundary(tmp_path):
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path / "t.model", identity=False))
    prompt = tokenizer.encode("The  answer is:", add_special_tokens=True)
    assert tokenizer.decode(prompt + tokenizer.encode_continuation(" Turin.")) == "The answer is: Turin."
    assert tokenizer.decode(prompt + tokenizer.encode_continuation("Turin.")) == "The answer is:Turin."


def test_prefix_is_bos_and_never_a_trailing_eos(tmp_path):
    with_eos = load_tokenizer(write_hugging_face(tmp_path / "hf", adds_eos=True))
    without = with_eos.encode("the river", add_special_tokens=False)
    assert with_eos.encode("the river", add_special_tokens=True) == [1, *without]
    piece = load_tokenizer(write_sentencepiece(tmp_path / "t.model"))
    assert piece.encode("the river", add_special_tokens=True)[0] == 1
    no_bos = load_tokenizer(write_sentencepiece(tmp_path / "n.model", bos=False))
    assert no_bos.encode("the", add_special_tokens=True) == no_bos.encode("the", add_special_tokens=False)
    assert with_eos.eos_token_id == piece.eos_token_id == 2


def test_vocab_size_covers_added_tokens_with_gaps(tmp_path):
    path = write_hugging_face(tmp_path / "hf")
    stored = json.loads((path / "tokenizer.json").read_text())
    stored["added_tokens"][-1]["id"] = stored["model"]["vocab"]["<|im_end|>"] = 1000
    (path / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = load_tokenizer(path)
    assert max(tokenizer.encode("a<|im_end|>", add_special_tokens=False)) == 1000
    assert tokenizer.vocab_size == 1001


def test_truncation_stored_in_the_tokenizer_is_not_applied(tmp_path):
    tokenizer = load_tokenizer(write_hugging_face(tmp_path / "hf", max_length=4))
    text = "the river " * 50
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_this_package_parses_a_tokenizer_file_once(tmp_path, monkeypatch):
    path = write_hugging_face(tmp_path / "a")
    vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    (path / "vocab.json").write_text(json.dumps(vocabulary))  # compared with tokenizer.json
    parsed = []

    class Counting:
        @staticmethod
        def from_file(file):
            parsed.append(file)
            return tokenizers_library.Tokenizer.from_file(file)

    for module in (tokenizer_contradictions, tokenizer_file):
        monkeypatch.setattr(module, "Tokenizer", Counting)
    load_tokenizer(path)
    assert parsed == [str(path / "tokenizer.json")]


def test_fingerprint_does_not_know_the_name_of_the_class(tmp_path):
    path = write_hugging_face(tmp_path / "a")
    first = load_tokenizer(path)
    named = type(first._tokenizer)
    name = named.__name__
    try:
        named.__name__ = "AnotherName"  # as in another version of transformers
        other = load_tokenizer(path)
    finally:
        named.__name__ = name
    assert other.fingerprint == first.fingerprint and other.has_fingerprint(first.fingerprint)
    assert not other.has_fingerprint("0" * 64)


def test_fingerprint_follows_the_tokens_not_the_place_or_the_template(tmp_path):
    first = load_tokenizer(write_hugging_face(tmp_path / "a"))
    same = load_tokenizer(write_hugging_face(tmp_path / "b", chat_template=STRICT, max_length=7))
    other = load_tokenizer(write_hugging_face(tmp_path / "c", vocab_size=380))
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert (first.chat_template, same.chat_template) == (CHATML, STRICT)
    before = first.fingerprint
    first.encode("the river", add_special_tokens=True)
    assert first.fingerprint == before == load_tokenizer(tmp_path / "a").fingerprint
    piece = load_tokenizer(write_sentencepiece(tmp_path / "a.model"))
    other_piece = load_tokenizer(write_sentencepiece(tmp_path / "b.model", bos=False))
    assert piece.fingerprint != other_piece.fingerprint


def test_render_chat(tmp_path):
    tokenizer = load_tokenizer(write_hugging_face(tmp_path / "strict", chat_template=STRICT))
    user = [{"role": "user", "content": "who?"}]
    assert tokenizer.render_chat(user, False) == "<|im_start|>user\nwho?<|im_end|>\n"
    assert tokenizer.render_chat(user, True) == "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(UserError, match=r"strict refuses the messages: System role not supported; write the system"):
        tokenizer.render_chat([{"role": "system", "content": "be brief"}, *user], True)
    assert load_tokenizer(write_hugging_face(tmp_path / "none", chat_template=None)).render_chat(user, True) is None
    assert load_tokenizer(write_sentencepiece(tmp_path / "t.model")).render_chat(user, True) is None


def test_an_error_inside_a_template_is_the_templates_and_any_other_keeps_its_type(tmp_path):
    path = write_hugging_face(tmp_path / "adding", chat_template="{{ messages[0]['content'] + 1 }}")
    with pytest.raises(UserError, match="refuses the messages: can only concatenate str"):
        load_tokenizer(path).render_chat([{"role": "user", "content": "who?"}], True)
    with pytest.raises(TypeError, match="'int' object"):
        load_tokenizer(path).render_chat(5, True)


def test_unloadable_paths_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.model").write_bytes(b"not a model")
    (tmp_path / "notes.txt").write_text("x")
    damaged = write_hugging_face(tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{}")
    for name in ("empty", "bad.model", "notes.txt", "absent", "damaged"):
        with pytest.raises(UserError) as caught:
            load_tokenizer(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_code_in_the_directory_is_not_run(tmp_path):
    path = write_hugging_face(tmp_path / "hf")
    marker = tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load_tokenizer(path)
    assert not marker.exists()


class UnknownOnly:
    """A tokenizer that knows no word of the alphabet's second half and drops them."""

    eos_token_id = 0
    unk_token_id = None

    def encode(self, text, *, add_special_tokens):
        return [ord(character) for character in text if character < "m"]

    def encode_continuation(self, text):
        return self.encode(text, add_special_tokens=False)

    def drops(self, character):
        return character >= "m"

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("xyz", "ab", "chosen: tokenizes to nothing"),
        ("abz", "ab", "same tokens as chosen: .* 'abz' has no tokens for 'z'"),
    ],
)
def test_responses_that_tokenize_to_nothing_or_alike(chosen, rejected, reason):
    responses = {"chosen": chosen, "rejected": rejected}
    with pytest.raises(UserError, match=reason):
        tokenize_row({"prompt_short": "a"}, responses, UnknownOnly(), "plain", {0})


def test_half_a_tokenizer_is_named(tmp_path):
    path = write_hugging_face(tmp_path / "tokenizer")
    vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    (path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer \(tokenizer\.json, .*\); copy its files from the original"):
        load_tokenizer(path)
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match=r"has vocab\.json and no merges\.txt, which belong together; copy merges\.txt"):
        load_tokenizer(path)

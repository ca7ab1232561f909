"""Counts are those of the tokens, and every document is counted once."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.triplets.corpus.formats import Document
from megatron_solopo.triplets.prompt import DEFAULT_TEMPLATE, Measure, PromptTemplate
from tests.data.tiny_tokenizers import write_sentencepiece
from tests.triplets.musique_example import construct, first_lines, write


@pytest.fixture(scope="module")
def tokenizers(tokenizer_path, hugging_face, sentencepiece, tmp_path_factory):
    identity = write_sentencepiece(tmp_path_factory.mktemp("identity") / "piece.model", identity=True)
    return [load_tokenizer(path) for path in (tokenizer_path, hugging_face, sentencepiece, identity)]


TEXTS = st.text(max_size=60) | st.sampled_from(
    ["", " ", "a\n\nb ", "<|im_end|>x", "\u00e9\U0001f600" * 9, "word " * 300]
)


@settings(max_examples=150)
@given(text=TEXTS, special=st.booleans())
def test_count_is_the_number_of_tokens(tokenizers, text, special) -> None:
    for tokenizer in tokenizers:
        count = tokenizer.count(text, add_special_tokens=special)
        assert count == len(tokenizer.encode(text, add_special_tokens=special))


def test_a_tokenizer_file_that_asks_for_truncation_is_counted_whole(tokenizer_path, tmp_path) -> None:
    made = AutoTokenizer.from_pretrained(tokenizer_path)
    made.backend_tokenizer.enable_truncation(5)
    made.backend_tokenizer.enable_padding(length=64)
    made.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).count("one two three " * 50, add_special_tokens=True) > 100


# As in Qwen's and Llama 3's tokenizer.json: ".\n\n" is one piece there, across the end of a document.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def qwen_like(tmp_path_factory, questions):
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = ("\n\n".join(document.text for document in question.documents) for question in questions.values())
    made.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("qwen")
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(path)
    return load_tokenizer(path)


@pytest.mark.parametrize("kind", ["byte level", "qwen"])
def test_documents_add_up_to_the_prompt(kind, tokenizer, qwen_like, questions) -> None:
    """What each document is counted as, summed, is the whole: so the first measure is nearly always the last."""
    tokenizer = {"byte level": tokenizer, "qwen": qwen_like}[kind]
    assert kind != "qwen" or len(tokenizer.encode("a.\n\n", add_special_tokens=False)) == 2
    prompt = PromptTemplate(DEFAULT_TEMPLATE, titles=True, template="plain")
    measure = Measure(tokenizer, "plain")
    documents = [document for question in list(questions.values())[:20] for document in question.documents]
    counts = measure.document_counter(prompt)(documents)
    empty = measure.prompt(prompt.prompt([], "Who?"))
    whole = measure.prompt(prompt.prompt(documents, "Who?"))
    assert abs(empty + sum(counts) - whole) <= 2 and whole > 40_000


def test_every_distinct_document_is_tokenized_once(tokenizer_path, tmp_path, monkeypatch) -> None:
    asked: Counter[Document] = Counter()
    original = Measure.document_counter

    def spying(self, prompt):
        count = original(self, prompt)

        def counted(documents):
            asked.update(documents)
            return count(documents)

        return counted

    monkeypatch.setattr(Measure, "document_counter", spying)
    lines = first_lines(20)
    report = construct(write(tmp_path / "few.jsonl", lines), tmp_path / "out.jsonl", tokenizer_path)
    assert max(asked.values()) == 1 and len(asked) >= report.pool_documents > 300

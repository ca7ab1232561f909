"""Tokenizers of a few hundred tokens, made on the spot in every style the code must tell apart."""

import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;?!'()-"
CORPUS = [
    "Which river crosses the city where the author was born?",
    "The author was born in Turin. The river Po crosses Turin.",
    "The answer is: the river Po, because Turin lies on the Po.",
    "Question: who wrote it? Answer: it cannot be told from the documents.",
    ALPHABET,
] * 3

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Refuses what it cannot write, as the templates of some published models do.
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
# Writes a prompt in another way once an answer follows.
REWRITING = "{{ messages | length }}" + CHATML

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def write_hugging_face(
    path: Path,
    chat_template: str | None = CHATML,
    style: str = "byte_level",
    vocab_size: int = 400,
    adds_eos: bool = False,
    max_length: int | None = None,
) -> Path:
    """A fast tokenizer directory.

    style: byte_level (GPT-2, Qwen), or one of the two that put a space before a text: metaspace (Llama 2 today)
    and prepend (Llama 2 before).
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    alphabet = list(ALPHABET.replace(" ", "▁"))
    if style == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", left=1)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    template = "<s> $A </s>" if adds_eos else "<s> $A"
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    if max_length is not None:
        tokenizer.enable_truncation(max_length)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template
    )
    fast.save_pretrained(path)
    ends = fast.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return path


def write_sentencepiece(
    path: Path, identity: bool = True, bos: bool = True, model_type: str = "unigram", byte_fallback: bool = True
) -> Path:
    """A `.model` file: identity keeps every space (Llama), else spaces collapse (the trainer's default)."""
    kept = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} if identity else {}
    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=stream,
            vocab_size=400,
            model_type=model_type,
            byte_fallback=byte_fallback,
            hard_vocab_limit=model_type == "bpe",
            bos_id=1 if bos else -1,
            minloglevel=2,
            **kept,
        )
    return path


def write_word_level(path: Path, rows: list[dict[str, str]], **settings: str) -> Path:
    """A tokenizer that knows the words of some rows and calls all others `<unk>`.

    settings: tokens that tokenizer_config.json names. tokenizer.json names `<unk>` in any case.
    """
    words = sorted({word for row in rows for text in row.values() for word in text.split()})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **settings).save_pretrained(path)
    return path


def write_incomplete_bpe(path: Path, *, bytes_known: str | None = None) -> Path:
    """A BPE tokenizer of single characters without an unknown token: it leaves out all others.

    Args:
        bytes_known: characters whose bytes it knows; it is then a byte-level one.
    """
    letters = ALPHABET if bytes_known is None else sorted({one for one in _byte_letters(bytes_known)})
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL_TOKENS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    if bytes_known is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    return path


def _byte_letters(text: str) -> str:
    """How a byte-level tokenizer writes the bytes of a text."""
    return "".join(piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text))


def write_unigram(path: Path) -> Path:
    """A Unigram tokenizer of single characters, whose settings name no unknown token."""
    pieces = [(token, 0.0) for token in SPECIAL_TOKENS] + [(letter, -1.0) for letter in ALPHABET]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    return path

"""Make the example's tokenizer and tiny model: everything a run needs, without a download."""

import json
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from megatron_solopo.files import atomic_path

TEXT = Path(__file__).with_name("musique.jsonl")
VOCABULARY = 4096
MAX_POSITIONS = 32768
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


@click.command(context_settings={"max_content_width": 120})
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory to write: config, safetensors weights, tokenizer. An earlier one is replaced, another refused.",
)
def main(output: Path) -> None:
    """Make the example's tokenizer and tiny model, without a download.

    The tokenizer is a byte-level BPE trained on the questions and paragraphs of musique.jsonl. The
    model is a Qwen2 of 4 layers with random weights: it knows nothing, and serves to show that the
    program runs and that parallel layouts agree. Running this again writes the same bytes.

    \b
    Example:
      python examples/musique/make_tokenizer_and_model.py --output examples/musique/work/model
    """
    if output.is_dir() and (foreign := {path.name for path in output.iterdir()} - OWN_FILES):
        raise click.ClickException(f"--output {output}: holds other files ({min(foreign)}), name a new directory")
    with atomic_path(output.resolve()) as directory:
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(directory)
        model = make_model(tokenizer)
        model.save_pretrained(directory)
    click.echo(f"{output}: vocabulary {len(tokenizer)}, {model.num_parameters():,} parameters")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4096 entries with Qwen's special tokens and the ChatML template.

    It splits text as Qwen2's tokenizer does. transformers takes that class for every directory of a Qwen2 model.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, characters])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHATML,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def texts() -> Iterator[str]:
    """Every question, title and paragraph of the example."""
    for line in TEXT.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row["question"]
        for paragraph in row["paragraphs"]:
            yield paragraph["title"]
            yield paragraph["paragraph_text"]


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A Qwen2 with tied embeddings, QKV bias and grouped queries; float32, from a fixed seed."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config)


if __name__ == "__main__":
    main()

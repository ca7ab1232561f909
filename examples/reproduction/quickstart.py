"""The parts of the quickstart that are not in the package: the base model, the contexts, the picture."""

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
    """Write short contexts, and long contexts with the same facts."""
    from miniature.pairs import write_contexts
    from miniature.runs import LONG_LENGTH, LONGS_PER_QUESTION, NUM_QUESTIONS

    write_contexts(output, NUM_QUESTIONS, LONGS_PER_QUESTION, LONG_LENGTH, seed=0)


@main.command()
@click.option("--output", required=True, type=_PATH, help="JSONL to write, as evaluate long-context reads it.")
def questions(output: Path) -> None:
    """Write questions on contexts of 16 to 1,024 words."""
    from megatron_solopo.files import atomic_path
    from megatron_solopo.triplets.context_rows import to_line
    from miniature.evaluate import question_rows
    from miniature.runs import EVAL_QUESTIONS, EVAL_SEED

    with atomic_path(output) as temporary:
        temporary.write_text("".join(map(to_line, question_rows(EVAL_QUESTIONS, EVAL_SEED))), encoding="utf-8")


@main.command()
@click.argument("results", nargs=2, type=_PATH)
@click.option("--output", required=True, type=_PATH, help="PNG to write.")
def compare(results: tuple[Path, Path], output: Path) -> None:
    """Compare two results of evaluate long-context: a table and a picture of accuracy against length."""
    from megatron_solopo.results.long_context import read_long_context
    from miniature.evaluate import LENGTHS, QUESTION_WORDS
    from miniature.figures import save_comparison

    found = [
        {
            length: cell.score
            for length in LENGTHS
            for cell in [each.cell("questions.long", "exact_match", length=length + QUESTION_WORDS)]
            if cell is not None
        }
        for each in map(read_long_context, results)
    ]
    click.echo(f"{'words':>8} {'before':>8} {'after':>8}")
    for length in LENGTHS:
        click.echo(f"{length:>8} {found[0][length]:>8.0%} {found[1][length]:>8.0%}")
    save_comparison(dict(zip(("before", "after"), found, strict=True)), output)
    click.echo(f"picture: {output}")


@main.command()
@click.argument("models", nargs=2, type=_PATH)
def ask(models: tuple[Path, Path]) -> None:
    """Ask two models a question on 512 words. If there is one that only the second answers right, ask that one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from miniature.evaluate import eval_set, right
    from miniature.runs import EVAL_QUESTIONS, EVAL_SEED

    before, after = [AutoModelForCausalLM.from_pretrained(each).eval() for each in models]
    examples = eval_set(512, EVAL_QUESTIONS, EVAL_SEED)
    number = int((right(after, examples).int() - right(before, examples).int()).argmax())
    tokenizer, prompt = AutoTokenizer.from_pretrained(models[1]), examples.prompts[number : number + 1]
    words = tokenizer.decode(prompt[0]).split()
    click.echo(f"{' '.join(words[:4])} ... {' '.join(words[-6:])}  ({len(words)} words)")
    for name, model in (("before", before), ("after", after)):
        answer = model.generate(prompt, max_new_tokens=2, do_sample=False)[0, prompt.shape[1] :]
        click.echo(f"{name:>8}: {tokenizer.decode(answer, skip_special_tokens=True)}")
    click.echo(f"{'right':>8}: {tokenizer.decode(examples.answers[number : number + 1])}")


if __name__ == "__main__":
    main()

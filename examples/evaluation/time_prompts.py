"""How long making a prompt of an exact length takes, in CPU seconds of this process, by task."""

import time
from pathlib import Path

import click

from megatron_solopo.data.rows import Content
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.evaluate.tasks.generated_tasks import GeneratedTasks, TaskSettings
from megatron_solopo.evaluate.tasks.question_corpus import QuestionCorpus
from megatron_solopo.evaluation_settings import QA
from megatron_solopo.triplets.prompt import DEFAULT_TEMPLATE, Measure, PromptTemplate

CORPUS = Path(__file__).parents[1] / "musique" / "musique.jsonl"
TASKS = ("needle_single", "variable_tracking", "common_words", QA)


class CountingMeasure(Measure):
    """Counts how often a prompt was measured."""

    calls = 0

    def prompt(self, prompt: Content) -> int:
        self.calls += 1
        return super().prompt(prompt)


@click.command()
@click.option("--tokenizer", required=True, help="Hugging Face directory or SentencePiece .model file.")
@click.option("--length", default=32768, show_default=True, help="Tokens of the prompts.")
def main(tokenizer: str, length: int) -> None:
    """Make one prompt of each kind and print what it took."""
    prompt = PromptTemplate(DEFAULT_TEMPLATE, titles=True, template="plain")
    corpus = QuestionCorpus(CORPUS, "musique", prompt, seed=0)
    for task in TASKS:
        measure = CountingMeasure(load_tokenizer(tokenizer), "plain")
        settings = TaskSettings((task,), (length,), depths=(0.5,), samples=1, seed=0)
        tasks = GeneratedTasks(settings, measure, "plain", corpus=corpus)
        start = time.process_time()
        tasks.build(tasks.specs()[0])
        click.echo(f"{task}: {time.process_time() - start:.2f} s, {measure.calls} tokenizations")


if __name__ == "__main__":
    main()

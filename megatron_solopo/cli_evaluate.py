"""The commands that evaluate models."""

import click


@click.group()
def evaluate() -> None:
    """Measure what a model does with long contexts, on any checkpoint."""

"""Rows as their tokens, with those that count told apart: what `data validate --show` prints.

Tokens of one kind in a row stand on one line, with a bar between them. So the page can be read without colour, too.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

from megatron_solopo.data.end_tokens import end_tokens
from megatron_solopo.data.messages import Content
from megatron_solopo.data.prepared import PROMPT_COLUMNS, RESPONSE_COLUMNS, token_columns
from megatron_solopo.data.rendering import check_arguments, check_template
from megatron_solopo.data.rows import PROMPT_FIELDS, RESPONSE_FIELDS, PreferenceRow, read_rows
from megatron_solopo.data.settings import ShowSettings, Template
from megatron_solopo.data.template_arguments import TemplateArguments
from megatron_solopo.data.template_effects import MEANINGS
from megatron_solopo.data.tokenize_row import TokenizedRow, tokenize_row
from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.errors import UserError

Kind = Literal["prompt", "context", "counts"]
"""A prompt's tokens; tokens of a response that do not count; tokens that do."""

Style = Callable[[Kind, str], str]
"""A token of some kind as it is printed."""

_BAR = "|"
_ENDS_SHOWN = 24


@dataclass(frozen=True)
class ShownTokens:
    """The tokens of a prompt or of a response."""

    field: str
    tokens: tuple[str, ...]
    """The text of each token."""
    counts: tuple[bool, ...]
    """Whether each of them counts; no token of a prompt does."""


@dataclass(frozen=True)
class ShownRow:
    """A row as tokens."""

    line: int
    id: str
    parts: tuple[ShownTokens, ...]
    notes: tuple[str, ...]
    """What the template does to the row, or why it cannot be tokenized."""

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON value."""
        return asdict(self)

    def page(self, style: Style) -> str:
        """The row for a reader: every token in the style of its kind."""
        lines = [f"row {self.id} (line {self.line})"]
        for part in self.parts:
            lines += [f"  {part.field}: {_counted(part)}", *(f"    {line}" for line in _lines(part, style))]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def show_rows(path: Path, settings: ShowSettings) -> list[ShownRow]:
    """The first legal rows of a file as tokens, by the rules of `data prepare`.

    Args:
        settings: with a number of rows and a tokenizer.

    Raises UserError if the tokenizer cannot be loaded, or lacks what the template needs.
    """
    assert settings.show is not None and settings.tokenizer is not None
    tokenizer = load_tokenizer(settings.tokenizer)
    ends, kwargs = end_tokens(settings.tokenizer, tokenizer), settings.chat_template_kwargs
    shown = []
    for row in islice((row for row in read_rows(path) if not row.errors), settings.show):
        is_chat = settings.template == "chat" or (settings.template == "auto" and row.form == "messages")
        template: Template = "chat" if is_chat else "plain"
        check_template(template, tokenizer, settings.tokenizer)
        check_arguments(template, tokenizer, TemplateArguments(kwargs))
        shown.append(_show(row, tokenizer, template, ends, kwargs))
    return shown


def _show(
    row: PreferenceRow, tokenizer: Tokenizer, template: Template, ends: Collection[int], kwargs: dict[str, Any]
) -> ShownRow:
    assert row.kind is not None and row.id is not None
    fields = dict(zip(token_columns(row.kind), (*PROMPT_FIELDS[row.kind], *RESPONSE_FIELDS[row.kind]), strict=True))
    prompts: dict[str, Content] = {column: row.contents[fields[column]] for column in PROMPT_COLUMNS[row.kind]}
    responses: dict[str, Content] = {column: row.contents[fields[column]] for column in RESPONSE_COLUMNS[row.kind]}
    try:
        tokenized = tokenize_row(prompts, responses, tokenizer, template, ends, row.arguments.over(kwargs))
    except UserError as error:
        return ShownRow(row.line, row.id, (), (f"refused: {error}",))
    parts = tuple(_part(fields[column], column, tokenized, tokenizer) for column in tokenized.ids)
    notes = tuple(f"{MEANINGS[effect.kind].words}: {effect.shown}" for effect in tokenized.effects)
    return ShownRow(row.line, row.id, parts, notes)


def _part(field: str, column: str, row: TokenizedRow, tokenizer: Tokenizer) -> ShownTokens:
    ids = row.ids[column]
    counts = row.masks.get(column, [False] * len(ids))
    return ShownTokens(field, tuple(tokenizer.decode([token]) for token in ids), tuple(counts))


def _counted(part: ShownTokens) -> str:
    total = f"{len(part.tokens):,} tokens"
    return f"{total}, {sum(part.counts):,} count" if any(part.counts) else total


def _lines(part: ShownTokens, style: Style) -> Iterator[str]:
    """One line for each run of tokens of one kind. Of a long run that does not count, its ends are shown."""
    is_prompt = not any(part.counts)
    for counts, run in groupby(zip(part.tokens, part.counts, strict=True), key=lambda pair: pair[1]):
        kind: Kind = "prompt" if is_prompt else "counts" if counts else "context"
        tokens = [_escaped(token) for token, _ in run]
        if not counts and len(tokens) > 2 * _ENDS_SHOWN:
            hidden = len(tokens) - 2 * _ENDS_SHOWN
            tokens[_ENDS_SHOWN:-_ENDS_SHOWN] = [f" ... {hidden:,} tokens ... "]
        yield f"{kind:8}{_BAR}{_BAR.join(style(kind, token) for token in tokens)}{_BAR}"


def _escaped(token: str) -> str:
    """A token on one line: line breaks and other characters that nobody sees are escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in token)

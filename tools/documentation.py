"""Hooks of mkdocs: write the reference pages from the code, and include documents that live outside `docs/`.

`mkdocs.yml` names this file. Two kinds of page have no text of their own in `docs/`:

- A page with the line `<!-- generated: configuration -->` or `<!-- generated: command line -->` gets what
  `configuration_reference` or `command_line_reference` returns in its place.
  `python -m tools.documentation configuration` prints it.
- A page of `INCLUDED` is the document itself, so its text has one home. Links between documents are changed to links
  between pages. A link to a file that is not on the site becomes the path of that file.
"""

import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from megatron_solopo.cli.main import cli
from megatron_solopo.config import Config

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs"
# The page of the site, and the document that it shows.
INCLUDED = {
    "guides/failures.md": "examples/slurm/FAILURES.md",
    "examples/reproduction.md": "examples/reproduction/README.md",
    "examples/musique.md": "examples/musique/README.md",
    "examples/smollm2.md": "examples/smollm2/README.md",
    "examples/long-context-128k.md": "examples/long-context-128k/README.md",
    "examples/plans.md": "examples/plans/README.md",
    "examples/paper.md": "examples/paper/README.md",
    "examples/on-policy.md": "examples/on_policy/README.md",
    "examples/evaluation.md": "examples/evaluation/README.md",
    "examples/slurm.md": "examples/slurm/README.md",
    "examples/megatron-lm.md": "examples/megatron_lm/README.md",
    "results/reproduction.md": "examples/reproduction/RESULTS.md",
    "results/measurements.md": "tools/RESULTS.md",
    "results/musique.md": "examples/musique/RESULTS.md",
    "results/smollm2.md": "examples/smollm2/RESULTS.md",
    "results/slurm.md": "examples/slurm/RESULTS.md",
    "results/paper.md": "examples/paper/RESULTS.md",
    "results/on-policy.md": "examples/on_policy/RESULTS.md",
    "results/paper-costs.md": "examples/paper/COSTS.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
PAGE_OF = {ROOT / document: page for page, document in INCLUDED.items()}
PICTURES = (".png", ".svg")
NO_PAGE = "no-page:"
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)((?:#[^)\s]*)?)(?=\))|(?<=<img src=\")([^\"]+)(?=\")")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the included documents and the pictures that any page shows."""
    for page, document in INCLUDED.items():
        files.append(File.generated(config, page, content=(ROOT / document).read_text(encoding="utf-8")))
    for picture in sorted(_pictures()):
        files.append(File.generated(config, _picture_page(picture), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated; let links lead to pages of the site."""
    for name, generate in GENERATED.items():
        marker = f"<!-- generated: {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, generate())
    uri = page.file.src_uri
    return links_within_the_site(markdown, uri, source_of(uri))


def source_of(uri: str) -> Path:
    """The file that holds the text of a page."""
    return ROOT / INCLUDED[uri] if uri in INCLUDED else SITE / uri


def links_within_the_site(markdown: str, uri: str, source: Path) -> str:
    """Change relative links of `source`, shown as the page `uri`, to links between pages of the site."""

    def page_or_path(match: re.Match[str]) -> str:
        target, anchor = match[1] or match[3], match[2] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = Path(os.path.normpath(source.parent / target))
        if path in PAGE_OF:
            page = PAGE_OF[path]
        elif path.is_relative_to(SITE):
            page = path.relative_to(SITE).as_posix()
        elif path.suffix in PICTURES:
            page = _picture_page(path)
        else:
            return f"{NO_PAGE}{path.relative_to(ROOT).as_posix()}"
        return os.path.relpath(page, Path(uri).parent) + anchor

    markdown = _LINK.sub(page_or_path, markdown)
    # A link to a file of the repository: its text where that is the path already, else text and path.
    return re.sub(rf"\[([^\]]*)\]\({NO_PAGE}([^)]*)\)", lambda match: _text_of_link(match[1], match[2]), markdown)


def _text_of_link(text: str, path: str) -> str:
    return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"


def _pictures() -> Iterator[Path]:
    sources = [*SITE.rglob("*.md"), *(ROOT / document for document in INCLUDED.values())]
    for source in sources:
        for match in _LINK.finditer(source.read_text(encoding="utf-8")):
            path = Path(os.path.normpath(source.parent / (match[1] or match[3])))
            if path.suffix in PICTURES and path.exists() and not path.is_relative_to(SITE):
                yield path


def _picture_page(path: Path) -> str:
    return f"pictures/{path.relative_to(ROOT).as_posix()}"


def configuration_reference() -> str:
    """Every key of the configuration: type, legal values, default and docstring, one table per section."""
    schema = Config.model_json_schema()
    sections = {
        name: schema["$defs"][found] for name, entry in schema["properties"].items() if (found := _name_of(entry))
    }
    keys = {name: entry for name, entry in schema["properties"].items() if name not in sections}
    tables = [_section("", {**schema, "properties": keys}, "Top level")]
    for name, section in sections.items():
        tables.append(_section(f"{name}.", section, f"`{name}`"))
        for key, entry in section["properties"].items():
            if item := _name_of_items(entry):
                tables.append(_section(f"{name}.{key}[].", schema["$defs"][item], f"`{name}.{key}`"))
    return "\n\n".join(tables)


def _name_of(entry: dict[str, Any]) -> str:
    """Of the section that a key holds, or that it holds unless it is null; empty for other keys."""
    named: dict[str, Any] = next((option for option in entry.get("anyOf", [entry]) if "$ref" in option), {})
    return str(named.get("$ref", "")).rpartition("/")[2]


def _name_of_items(entry: dict[str, Any]) -> str:
    """Of the section that each item of a list is; empty for other keys."""
    return next((name for option in entry.get("anyOf", [entry]) if (name := _name_of(option.get("items", {})))), "")


def _section(prefix: str, schema: dict[str, Any], title: str) -> str:
    lines = [
        f"## {title}",
        "",
        schema["description"],
        "",
        "| key | legal values | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, entry in schema["properties"].items():
        default = "**required**" if name in schema.get("required", ()) else f"`{json.dumps(entry['default'])}`"
        meaning = _cell(entry.get("description", ""))
        lines.append(f"| `{prefix}{name}` | {legal_values(entry)} | {default} | {meaning} |")
    return "\n".join(lines)


def legal_values(entry: dict[str, Any]) -> str:
    """Type and legal values of one key, from its JSON schema."""
    if "anyOf" in entry:
        return " or ".join(legal_values(option) for option in entry["anyOf"])
    if "$ref" in entry:
        return "sections"
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if entry["type"] == "array":
        return f"list of {legal_values(entry['items'])}"
    if entry["type"] == "null":
        return "`null`"
    kind = {"string": "path" if entry.get("format") == "path" else "text"}.get(entry["type"], entry["type"])
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {entry[key]:g}" for key, sign in signs.items() if key in entry]
    return " ".join([kind, ", ".join(limits)]).strip()


def command_line_reference() -> str:
    """Every command: its text, its usage and its options, as click holds them."""
    return "\n\n".join(_commands(cli, "megatron-solopo"))


def _commands(command: click.Command, path: str) -> Iterator[str]:
    yield _command(command, path)
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from _commands(command.commands[name], f"{path} {name}")


def _command(command: click.Command, path: str) -> str:
    context = click.Context(command, info_name=path)
    parts = [f"## {path}", _help_text(command.help or "")]
    if isinstance(command, click.Group):
        return "\n\n".join(parts)
    usage = " ".join(command.collect_usage_pieces(context))
    parts.append(f"```text\n{path} {usage}\n```")
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    records = [record for option in options if (record := option.get_help_record(context))]
    if records:
        rows = "\n".join(f"| `{names}` | {_cell(text)} |" for names, text in records)
        parts.append(f"| option | meaning |\n|---|---|\n{rows}")
    return "\n\n".join(parts)


def _help_text(text: str) -> str:
    """Help in Markdown: a paragraph that click must not wrap (behind a line with \\b) becomes a block of code."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(
        f"```text\n{inspect.cleandoc(paragraph.removeprefix(chr(8)))}\n```" if paragraph.startswith("\b") else paragraph
        for paragraph in paragraphs
    )


def _cell(text: str) -> str:
    """Text of a table's cell. Within code, a table shows `|` and `<` as they are."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    parts[::2] = [part.replace("|", "\\|").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


GENERATED: dict[str, Callable[[], str]] = {
    "configuration": configuration_reference,
    "command line": command_line_reference,
}


@click.command()
@click.argument("name", type=click.Choice(list(GENERATED)))
def main(name: str) -> None:
    """Print a page that is generated, in Markdown.

    \b
    Examples:
      python -m tools.documentation configuration
    """
    click.echo(GENERATED[name]())


if __name__ == "__main__":
    main()

"""The commands that the documents show exist, with the options that they show."""

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from megatron_solopo.cli.main import cli
from megatron_solopo.config import Config, load_config, parse_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("examples/*/*.md"), *ROOT.glob("examples/*/*.sh")]


def shown_commands(text: str) -> list[list[str]]:
    """Every `megatron-solopo ...` line, continuation lines joined, comments cut; as words after the program's name."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"^\s*(?:torchrun .* -m megatron_solopo|megatron-solopo) (.+)$", joined, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


COMMANDS = [(path.name, words) for path in DOCUMENTS for words in shown_commands(path.read_text(encoding="utf-8"))]


def test_the_documents_show_commands() -> None:
    assert {words[0] for _, words in COMMANDS} >= {"doctor", "data", "train"}


@pytest.mark.parametrize(("document", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_shown_command_exists_with_its_options(document: str, words: list[str]) -> None:
    command: click.Command = cli
    while isinstance(command, click.Group):
        command = command.commands[words[0]]
        words = words[1:]
    options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    for word in words:
        assert not word.startswith("-") or word in options, document


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/*.yaml")), ids=lambda path: path.parent.name)
def test_every_shipped_config_is_legal(path: Path) -> None:
    assert load_config(path).run_dir


def test_the_readmes_config_is_legal() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"\n\n((?: {4}.*\n)*? {4}run_dir:(?:.*\n(?= {4}))*.*\n)", text)
    assert block
    config = parse_config(yaml.safe_load(block.group(1).replace("\n    ", "\n").lstrip()), source="README.md")
    assert isinstance(config, Config) and config.parallel.context_parallel_size == 4


def test_the_readmes_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(
            r"(?:`|^ {4})make ([a-z0-9-]+)", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE
        ):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{document}: make {target}"


@pytest.mark.parametrize(
    "document", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("*/*/*.md")), ids=lambda path: path.name
)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (document.parent / target).exists(), target

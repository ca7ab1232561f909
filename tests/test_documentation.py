"""The documents show commands, configurations, links and pictures that exist; the reference pages hold every key."""

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import yaml
from click.testing import CliRunner

from megatron_solopo.cli.main import cli
from megatron_solopo.config import Config, load_config, parse_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("tools/*.md")}
)
SCRIPTS = sorted(ROOT.glob("examples/*/*.sh"))
MUSIQUE = ROOT / "examples" / "musique" / "config.yaml"
REQUIRED = {
    "run_dir": "run",
    "model": {"path": "model"},
    "data": {"path": "data", "max_tokens_per_pack": 1024},
    "training": {"global_batch_size": 8},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def shown_commands(text: str) -> list[list[str]]:
    """Every `megatron-solopo ...` line, continuation lines joined, comments cut; as words after the program's name."""
    joined = re.sub(r"\\{1,2}\n\s*", " ", text)  # a here-document doubles the backslash
    launchers = r"(?:torchrun|python -m megatron_solopo\.launch) .*-m megatron_solopo"
    found = re.findall(rf"^\s*(?:{launchers}|megatron-solopo) (.+)$", joined, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


COMMANDS = [
    pytest.param(words, id=f"{name_of(path)}: {' '.join(words)[:50]}")
    for path in [*DOCUMENTS, *SCRIPTS]
    for words in shown_commands(path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_shown_command_is_one_that_the_command_line_takes(words: list[str]) -> None:
    command: click.Command = cli
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    if "--help" in words:
        return
    context = click.Context(command)
    parsed, unread, _ = command.make_parser(context).parse_args(list(words))
    assert not unread
    # click marks what is not given with None or, in later versions, with a value of its own.
    values = {name: value for name, value in parsed.items() if isinstance(value, str | tuple | list | bool | int)}
    for parameter in command.params:
        value = values.get(parameter.name)
        assert value is not None or not parameter.required, parameter.name
        if isinstance(value, str) and "$" not in value and not isinstance(parameter.type, click.Path):
            parameter.type_cast_value(context, value)
    overrides = [word for word in values.get("overrides", ()) if "$" not in word]
    assert load_config(MUSIQUE, overrides)


def test_the_documents_show_the_main_commands() -> None:
    assert {parameter.values[0][0] for parameter in COMMANDS} >= {
        "convert", "data", "doctor", "evaluate", "plan", "reference", "report", "train"
    }  # fmt: skip


CONFIGS = [
    pytest.param(block, id=f"{name_of(path)}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.parametrize("block", CONFIGS)
def test_a_shown_configuration_is_legal(block: str) -> None:
    shown: dict[str, Any] = yaml.safe_load(block)
    required = {name: value for name, value in REQUIRED.items() if name not in shown}
    assert isinstance(parse_config(required | shown, source="document"), Config)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/*.yaml")), ids=name_of)
def test_every_shipped_config_is_legal(path: Path) -> None:
    assert load_config(path).run_dir


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_shown_make_targets_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^ {4})make ([a-z0-9-]+)", document.read_text(encoding="utf-8"), re.MULTILINE):
        assert re.search(rf"^{target}.*:", makefile, flags=re.MULTILINE), f"make {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_and_pictures_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r"<img src=\"([^\"]+)\"", text):
        assert target.startswith("https://") or (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_named_tests_and_tools_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tests|tools|megatron_solopo|examples)/[\w/.-]+\.(?:py|sh|md|yaml|json))`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (tools[\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_readme_is_short_and_states_the_gpu_status_first() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 700
    status = re.search(r"\n\| part \| status \|\n\|[-|]+\n(.*)\n", text)
    assert status and "GPU" in status[1] and "not yet run on a GPU" in status[1]


class TestSite:
    """The hooks of the documentation site."""

    @pytest.fixture
    def documentation(self) -> Any:
        pytest.importorskip("mkdocs")
        from tools import documentation

        return documentation

    def test_the_configuration_reference_holds_every_key_with_type_default_and_meaning(
        self, documentation: Any
    ) -> None:
        text = documentation.configuration_reference()
        for section, field in Config.model_fields.items():
            # A section may be null.
            kinds = [field.annotation, *get_args(field.annotation)]
            keys = next((each.model_fields for each in kinds if hasattr(each, "model_fields")), None)
            for name in [f"{section}.{key}" for key in keys] if keys else [section]:
                assert f"| `{name}` |" in text
        assert re.search(r"\| `parallel.tensor_model_parallel_size` \| integer > 0 \| `1` \| \w", text)
        assert re.search(r"\| `objective.distance` \| `l1`, `l2`, `huber` \| `\"l1\"` \| \w", text)
        assert re.search(r"\| `model.path` \| path \| \*\*required\*\* \| \w", text)
        shown = pytest.importorskip("markdown").markdown(text, extensions=["tables"])
        assert "<code>Et*7|(t*8|)*2t*7L</code>" in shown and "&amp;lt;" not in shown

    @pytest.mark.parametrize("page", ["configuration", "command_line"])
    def test_a_page_says_the_command_that_prints_it(self, page: str, documentation: Any) -> None:
        text = (ROOT / "docs" / "reference" / f"{page}.md").read_text(encoding="utf-8")
        (command,) = re.findall(r"`python -m tools\.documentation ([^`]*)`", text)
        printed = CliRunner().invoke(documentation.main, shlex.split(command))
        assert printed.exit_code == 0 and printed.stdout == documentation.GENERATED[page.replace("_", " ")]() + "\n"
        assert f"<!-- generated: {shlex.split(command)[0]} -->" in text

    def test_the_command_line_reference_holds_every_option(self, documentation: Any) -> None:
        text = documentation.command_line_reference()

        def check(command: click.Command, path: str) -> None:
            section = re.search(rf"^## {path}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
            assert section, path
            for parameter in command.params:
                if isinstance(parameter, click.Option) and not parameter.hidden:
                    assert parameter.opts[0] in section[1], f"{path} {parameter.opts[0]}"
            for name, inner in getattr(command, "commands", {}).items():
                check(inner, f"{path} {name}")

        for name, command in cli.commands.items():
            check(command, f"megatron-solopo {name}")

    def test_links_between_documents_lead_to_pages(self, documentation: Any) -> None:
        def shown(text: str) -> str:
            return str(
                documentation.links_within_the_site(text, "guides/data.md", ROOT / "docs" / "guides" / "data.md")
            )

        assert shown("[a](../../tools/RESULTS.md#b)") == "[a](../results/measurements.md#b)"
        assert shown("[a](training.md#b)") == "[a](training.md#b)"
        assert shown("[a](https://example.org/x.md)") == "[a](https://example.org/x.md)"
        assert shown("[the schema](../../megatron_solopo/config/schema.py)") == (
            "the schema (`megatron_solopo/config/schema.py`)"
        )
        picture = "![a](../../examples/reproduction/accuracy.png)"
        assert shown(picture) == "![a](../pictures/examples/reproduction/accuracy.png)"

    def test_every_document_is_in_the_menu(self, documentation: Any) -> None:
        menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
        pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
        for page in pages | set(documentation.INCLUDED):
            assert re.search(rf": {re.escape(page)}$", menu, re.MULTILINE), page
        results = {name_of(path) for path in ROOT.rglob("RESULTS.md") if not name_of(path).startswith((".", "build"))}
        assert results <= set(documentation.INCLUDED.values())

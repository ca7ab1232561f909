"""The page and its files: whole, of one piece, honest about what is missing."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_solopo.cli.main import main
from tests.report.written_runs import step_line, write_answers, write_preferences, write_run


class Outline(HTMLParser):
    """Tags that load something, images and their words, and tags that were not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.sources += [values[name] or "" for name in ("src", "srcset", "href") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag not in ("meta", "link", "img", "source", "br", "li"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "li":
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_run(folder / "solopo", objective={"name": "solopo"})
    write_answers(folder / "solopo", skill=0.9, step=120)
    write_answers(folder / "solopo", skill=0.1, step=None)
    write_preferences(folder / "solopo", skill=0.9, step=120)
    write_run(folder / "<long>", steps=30, objective={"name": "long_po"})
    broken = write_run(folder / "broken", objective={"name": "short_po"})
    lines = [json.dumps(step_line(step, 0, loss=None if step >= 3 else 0.7)) for step in range(1, 5)]
    (broken / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5')
    write_run(folder / "waiting", steps=0)
    main(
        [
            "report",
            *(str(folder / name) for name in ("solopo", "<long>", "broken", "waiting")),
            "--output",
            str(folder / "out"),
        ]
    )
    return folder / "out"


def test_the_page_loads_nothing_from_elsewhere(report: Path) -> None:
    outline = Outline((report / "index.html").read_text())
    assert outline.open == []
    assert outline.sources and all(source.startswith("data:") for source in outline.sources)
    assert "http" not in re.sub(r"data:[^\"]*", "", (report / "index.html").read_text())
    assert all(len(image["alt"] or "") > 30 for image in outline.images)


def test_every_kind_of_run_has_its_word(report: Path) -> None:
    text = (report / "index.html").read_text()
    said = dict(re.findall(r"<li><strong>(.*?)</strong>: <span class=\"word [\w ]+\">([\w ]+)</span>", text))
    assert said == {"solopo": "finished", "&lt;long&gt;": "unfinished", "broken": "diverged", "waiting": "not started"}
    assert "It ends at step 4. In 2 steps the loss or the gradient was not finite." in text
    assert "1 damaged line left out (5)" in text
    assert "No answers from long contexts yet of &lt;long&gt;, broken, waiting" in text
    assert "<code>objective.name</code>" in text and "<code>seed</code>" not in text


def test_pictures_lie_beside_it(report: Path) -> None:
    names = {path.stem for path in report.glob("*.png")}
    assert names >= {"accuracy-by-length", "reward-accuracy-by-length", "losses", "gap", "gradient-and-throughput"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.glob("*.png"))
    numbers = json.loads((report / "report.json").read_text(), parse_constant=pytest.fail)
    assert [run["status"]["word"] for run in numbers["runs"]] == ["finished", "unfinished", "diverged", "not started"]


def test_a_report_is_replaced_and_nothing_else(
    report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", steps=3)
    shutil.copytree(report, tmp_path / "out")
    main(["report", str(run), "--output", str(tmp_path / "out")])
    assert "One run" in (tmp_path / "out" / "index.html").read_text()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    capsys.readouterr()
    for output, expected in ((tmp_path / "out", "holds notes.txt"), (run, "exists and is no report")):
        with pytest.raises(SystemExit) as stop:
            main(["report", str(run), "--output", str(output)])
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and expected in lines[0]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "absent")])
    assert stop.value.code == 2
    expected = f"error: {tmp_path / 'absent'}: no such directory; name the run_dir of a training run\n"
    assert capsys.readouterr().err == expected


def test_a_report_needs_neither_torch_nor_megatron(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    script = (
        "import sys; from megatron_solopo.cli.main import main; main(sys.argv[1:]); "
        "sys.exit(' '.join({'torch', 'megatron', 'transformers', 'datasets'} & set(sys.modules)) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "report", str(run), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")

"""Large files are read once, and every change of their bytes is seen."""

import json
import os
from pathlib import Path

import pytest

from megatron_solopo import checksums
from megatron_solopo.checksums import CHECKSUMS_FILE, LargeFile, directory_fingerprint, file_checksums


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files that were not written just now, as far as the code can tell."""
    monkeypatch.setattr(checksums, "_SETTLED_NS", 0)
    for number, name in enumerate(("a.safetensors", "b.safetensors")):
        (tmp_path / name).write_bytes(bytes(range(256)) * 100 + bytes([number]))
    return tmp_path


def read(folder: Path) -> dict[str, str]:
    return file_checksums(folder, {file.name: LargeFile.whole(file) for file in folder.glob("*.safetensors")})


def tamper(folder: Path) -> None:
    """Change the kept checksum of a, and forget what this process knows."""
    kept = json.loads((folder / CHECKSUMS_FILE).read_text())
    kept["files"]["a.safetensors"]["checksum"] = "kept"
    (folder / CHECKSUMS_FILE).write_text(json.dumps(kept))
    checksums._known_here.clear()


def test_a_kept_checksum_is_used_while_the_file_is_unchanged(folder: Path) -> None:
    first = read(folder)
    assert len(set(first.values())) == 2
    tamper(folder)
    assert read(folder) == first | {"a.safetensors": "kept"}
    (folder / CHECKSUMS_FILE).write_text("{")
    checksums._known_here.clear()
    assert read(folder) == first, "a damaged file of checksums is made again"


@pytest.mark.parametrize("place", [0, 12_345, -1])
def test_a_change_of_one_bit_is_seen_even_if_the_time_of_the_file_is_set_back(place: int, folder: Path) -> None:
    first, file = read(folder), folder / "a.safetensors"
    tamper(folder)
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns and file.stat().st_size == before.st_size
    changed = read(folder)
    assert changed["a.safetensors"] not in (first["a.safetensors"], "kept")
    assert changed["b.safetensors"] == first["b.safetensors"]


def test_what_was_written_just_now_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_SETTLED_NS", 10**12)
    assert read(folder) == read(folder)
    assert not (folder / CHECKSUMS_FILE).exists() and not checksums._known_here.keys() & set(folder.iterdir())


def test_a_directory_that_cannot_be_written_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checksums, "_SETTLED_NS", -(10**18))
    folder = Path("/proc/sys/kernel")  # not even root creates a file there
    files = {"ostype": LargeFile(folder / "ostype", (("", 0, 5),))}
    assert file_checksums(folder, files) == file_checksums(folder, files)
    said = capsys.readouterr().err
    assert said.count("note: checksums of /proc/sys/kernel are not kept") == 1 and said.count("\n") == 1


def test_the_fingerprint_of_a_directory_is_that_of_the_files_that_decide(folder: Path) -> None:
    prints = {directory_fingerprint(folder)}
    (folder / "README.md").write_text("A model.")
    (folder / "eval_results.json").write_text("{}")
    prints.add(directory_fingerprint(folder))
    assert len(prints) == 1 and (folder / CHECKSUMS_FILE).exists()
    for name in ("tokenizer.json", "chat_template.jinja", "c.safetensors"):
        (folder / name).write_text("{}")
        prints.add(directory_fingerprint(folder))
    assert len(prints) == 4

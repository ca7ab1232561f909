"""Large files are read once, and every change of their bytes is seen."""

import json
import os
from pathlib import Path

import pytest

from megatron_solopo import checksums
from megatron_solopo.checksums import (
    CHECKSUMS_FILE,
    KnownFile,
    LargeFile,
    directory_fingerprint,
    file_checksums,
    read_checksums,
    unread_files,
)


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


# Not even root creates a file there.
READ_ONLY = Path("/proc/sys/kernel")
IN_IT = {"ostype": LargeFile(READ_ONLY / "ostype", (("", 0, 5),))}


@pytest.mark.parametrize("cache", ["cache", "/proc/sys/kernel"])
def test_a_directory_that_cannot_be_written_is_said_once(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    monkeypatch.setattr(checksums, "_SETTLED_NS", -(10**18))
    monkeypatch.setattr(checksums, "_said", set())
    monkeypatch.setattr(checksums, "_known_here", {})
    assert file_checksums(READ_ONLY, IN_IT) == file_checksums(READ_ONLY, IN_IT)
    said = capsys.readouterr().err
    kept = "are not kept" if cache.startswith("/proc") else f"are kept in {tmp_path / cache}/megatron-solopo"
    assert said.count(f"note: checksums of /proc/sys/kernel {kept}") == 1 and said.count("\n") == 1


def test_the_next_process_does_not_read_a_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(checksums, "_SETTLED_NS", -(10**18))
    monkeypatch.setattr(checksums, "_known_here", {})
    monkeypatch.setattr(
        LargeFile,
        "known_as",
        lambda file, checksum: KnownFile(bytes=5, modified_ns=1, changed_ns=1, pieces="", checksum=checksum),
    )  # its times change at each look
    first = file_checksums(READ_ONLY, IN_IT)
    monkeypatch.setattr(checksums, "_known_here", {})  # as another process finds it
    assert unread_files(READ_ONLY, IN_IT) == {}
    monkeypatch.setattr(checksums, "_read_file", None)  # it would be called
    assert file_checksums(READ_ONLY, IN_IT) == first


def test_progress_is_told_while_a_file_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_BLOCK_BYTES", 1000)
    told: list[None] = []
    found = read_checksums({"a": LargeFile.whole(folder / "a.safetensors")}, folder, lambda: told.append(None))
    assert len(told) == 26, "25,601 bytes in pieces of 1,000"
    assert found["a"].checksum == read(folder)["a.safetensors"]


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

"""Files are complete or absent; fingerprints change when the content does."""

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.files import (
    atomic_path,
    check_replaceable,
    read_jsonl,
    remove,
    sha256_file,
    sha256_json,
    sha256_text,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists() and temporary.parent == target.parent
        temporary.write_text("whole")
    assert target.read_text() == "whole" and names(target.parent) == ["file.txt"]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(interruption), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise interruption
    assert target.read_text() == "old" and names(tmp_path) == ["file.txt"]


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "data"
    target.mkdir()
    (target / "stale").write_text("old")
    with atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / "fresh").write_text("new")
        assert names(target) == ["stale"]
    assert names(target) == ["fresh"] and names(tmp_path) == ["data"]


def test_an_interrupted_directory_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "data"
    target.mkdir()
    (target / "kept").write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        (temporary / "nested").mkdir(parents=True)
        raise RuntimeError
    assert names(target) == ["kept"] and names(tmp_path) == ["data"]


def test_leftovers_of_a_killed_process_are_cleared_and_those_of_a_live_one_are_not(tmp_path: Path) -> None:
    target = tmp_path / "data"
    with atomic_path(target) as temporary:
        own = temporary.name
        temporary.write_text("first")
    (process,) = re.findall(r"\d+$", own)
    finished = subprocess.Popen(["true"])
    finished.wait()
    dead, alive = (own.removesuffix(process) + str(pid) for pid in (finished.pid, os.getppid()))
    for name in (dead, alive, f"{dead}.corpus"):
        (tmp_path / name).mkdir()
    with atomic_path(target) as temporary:
        temporary.write_text("second")
    assert target.read_text() == "second" and names(tmp_path) == [alive, "data"]


def test_a_directory_with_foreign_files_is_not_replaceable(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    check_replaceable(folder, {"own"}, "cache.path")
    folder.mkdir()
    (folder / "own").write_text("x")
    check_replaceable(folder, {"own"}, "cache.path")
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"cache: holds thesis\.tex, .* set cache\.path to another"):
        check_replaceable(folder, {"own"}, "cache.path")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        check_replaceable(folder / "thesis.tex", {"own"}, "cache.path")


def test_an_unfinished_last_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_body_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file.txt"):
        pass
    assert names(tmp_path) == []


def test_remove_takes_files_directories_links_and_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "inside").write_text("x")
    link, folder, file = tmp_path / "link", tmp_path / "folder", tmp_path / "file"
    link.symlink_to(kept)
    (folder / "deep").mkdir(parents=True)
    file.write_text("x")
    for path in (link, folder, file, tmp_path / "absent"):
        remove(path)
    assert names(tmp_path) == ["kept"] and names(kept) == ["inside"], "a link is removed, not what it points to"


def test_json_is_readable_and_round_trips(tmp_path: Path) -> None:
    value = {"name": "Zoë", "values": [1, 2.5, None]}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and "Zoë" in text and text.endswith("}\n")


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "value.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {"path": tmp_path})
    assert (tmp_path / "value.json").read_text() == "1\n" and names(tmp_path) == ["value.json"]


def test_hashes_are_sha256(tmp_path: Path) -> None:
    expected = hashlib.sha256("Zoë".encode()).hexdigest()
    (tmp_path / "text").write_text("Zoë", encoding="utf-8")
    assert sha256_text("Zoë") == sha256_file(tmp_path / "text") == expected


def test_the_hash_of_json_ignores_key_order_alone() -> None:
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json({"b": [1, 2]}) != sha256_json({"b": [2, 1]})
    assert sha256_json("1") != sha256_json(1)

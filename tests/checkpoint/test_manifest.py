"""Every file of a checkpoint as it was written, or named."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_solopo.checkpoint.manifest import (
    MANIFEST,
    check_listed,
    damages,
    file_shares,
    read_manifest,
    sealed_files,
    write_manifest,
)
from megatron_solopo.errors import UserError

CONTENT = {
    "a.distcp": b"a" * 5000,
    "b.distcp": b"",
    "rng/rank_0": os.urandom(1 << 23),
    "huggingface/config.json": b"{}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, sealed_files(tmp_path, CONTENT))
    return tmp_path


def flip(file: Path, place: int = 100) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_what_was_written_is_found_again(folder: Path) -> None:
    files = read_manifest(folder)
    assert {name: entry.bytes for name, entry in files.items()} == {name: len(each) for name, each in CONTENT.items()}
    assert damages(folder, files, checksums=True) == []
    assert check_listed(folder, checksums=True) == "4 files as written"


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (flip, "a.distcp", "another checksum"),
        (lambda file: flip(file, (1 << 23) - 1), "rng/rank_0", "another checksum"),
        (truncate, "a.distcp", "has 4,999 bytes instead of 5,000"),
        (lambda file: file.write_bytes(b"x"), "b.distcp", "has 1 bytes instead of 0"),
        (Path.unlink, "b.distcp", "is missing"),
        (lambda file: (file.unlink(), file.mkdir()), "rng/rank_0", "instead of"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], object], name: str, words: str, folder: Path) -> None:
    damage(folder / name)
    (found,) = damages(folder, read_manifest(folder), checksums=True)
    assert found.startswith(f"{folder / name}: ") and words in found
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        check_listed(folder, checksums=True)


def test_sizes_alone_find_no_flipped_bit(folder: Path) -> None:
    flip(folder / "a.distcp")
    assert damages(folder, read_manifest(folder), checksums=False) == []


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda file: file.write_text(file.read_text()[:-9]),
        lambda file: file.write_text(file.read_text().replace("5000", "5001")),
        lambda file: file.write_text("{}"),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"algorithm": "md5"})),
    ],
)
def test_a_damaged_manifest_is_named_itself(damage: Callable[[Path], object], folder: Path) -> None:
    damage(folder / MANIFEST)
    with pytest.raises(UserError) as error:
        read_manifest(folder)
    assert str(error.value).startswith(str(folder / MANIFEST))


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(folder: Path) -> None:
    original = read_manifest(folder)
    content = (folder / MANIFEST).read_bytes()
    for place in range(len(content)):
        (folder / MANIFEST).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            assert read_manifest(folder) == original, place  # a space that became an exclamation mark is not JSON
        except UserError:
            continue


def test_what_people_may_edit_is_told_and_no_damage(folder: Path) -> None:
    (folder / "huggingface" / "config.json").write_text('{"rope_scaling": null}')
    assert check_listed(folder, checksums=True).endswith("but changed by hand: huggingface/config.json")


def test_ranks_share_the_files_by_size(folder: Path) -> None:
    files = read_manifest(folder)
    shares = file_shares(files, 3)
    assert sorted(name for each in shares for name in each) == sorted(CONTENT)
    assert [list(each) for each in shares][:2] == [["rng/rank_0"], ["a.distcp"]]

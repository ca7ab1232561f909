"""Pieces of tensors, mapped where torch has written them."""

import io
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.checkpoint import megatron_reader
from megatron_solopo.checkpoint.conversion import import_model
from megatron_solopo.checkpoint.mapping import megatron_shape, place, rules
from megatron_solopo.checkpoint.megatron_reader import MegatronDirectory, Piece
from megatron_solopo.errors import UserError
from tests.tiny_models import make_model


def store(path: Path, *tensors: Tensor) -> list[Piece]:
    """Several in one file, as torch's distributed checkpointing writes them."""
    pieces = []
    with path.open("wb") as stream:
        stream.write(b"-")  # so that no number lies at a multiple of its width
        for number, tensor in enumerate(tensors):
            buffer = io.BytesIO()
            torch.save(tensor, buffer)
            start = stream.tell()
            stream.write(buffer.getvalue())
            shape = tuple(tensor.shape)
            pieces.append(Piece(f"weight {number}", (0,), shape, tensor.dtype, path, start, stream.tell() - start))
    return pieces


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_layout_is_read_as_torch_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.randn(12, 7).to(dtype)
    stored = [torch.randn(3).to(dtype), whole, whole.T, whole[2:5], whole[:, 1:3], torch.randn(1, 5, 3).to(dtype)]
    pieces = store(tmp_path / "file", *stored)
    for piece, tensor in zip(pieces, stored, strict=True):
        found = piece.read()
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)


def test_a_large_piece_takes_memory_for_what_is_used_alone(tmp_path: Path) -> None:
    (piece,) = store(tmp_path / "file", torch.ones(1 << 14, 1 << 10))
    process = psutil.Process()
    before = process.memory_info().rss
    rows = piece.read()[100:200]
    assert rows.sum() == 100 << 10
    taken = process.memory_info().rss - before
    assert taken < 8 << 20, taken


def test_the_file_stays_as_it_is(tmp_path: Path) -> None:
    (piece,) = store(tmp_path / "file", torch.ones(4))
    before = piece.file.read_bytes()
    piece.read().zero_()
    assert piece.file.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda piece: replace(piece, shape=(4, 3)), "holds torch.float32 of shape (3, 4)"),
        (lambda piece: replace(piece, dtype=torch.bfloat16), "instead of torch.bfloat16"),
        (lambda piece: replace(piece, length=piece.length - 1), "cannot be read"),
        (lambda piece: replace(piece, length=10), "cannot be read"),
        (lambda piece: replace(piece, start=piece.start + 1), "cannot be read"),
    ],
    ids=["shape", "precision", "cut", "cut to its beginning", "place"],
)
def test_what_is_not_there_is_named(tmp_path: Path, damage: Callable[[Piece], Piece], problem: str) -> None:
    piece = damage(store(tmp_path / "file", torch.ones(3, 4))[0])
    with pytest.raises(UserError, match="the checkpoint is damaged") as caught:
        piece.read()
    message = str(caught.value)
    assert problem in message
    assert message.startswith(f"{tmp_path / 'file'}: weight 0 cannot be read: ")


def test_torn_bytes_are_named_whatever_they_lead_to(tmp_path: Path) -> None:
    (piece,) = store(tmp_path / "file", torch.ones(3, 4))
    content = piece.file.read_bytes()
    generator = random.Random(0)
    named = 0
    for _ in range(300):
        torn = bytearray(content)
        for byte in generator.sample(range(1, len(torn)), 3):
            torn[byte] = generator.randrange(256)
        piece.file.write_bytes(torn)
        try:
            piece.read()
        except UserError as error:
            assert str(error).startswith(f"{piece.file}: weight 0 cannot be read: ")
            named += 1
    assert named > 30


def test_something_else_than_a_tensor_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": 1}, buffer)
    (tmp_path / "file").write_bytes(buffer.getvalue())
    piece = Piece("weight", (0,), (1,), torch.float32, tmp_path / "file", 0, len(buffer.getvalue()))
    with pytest.raises(UserError, match="weight cannot be read"):
        piece.read()


def test_an_expert_is_read_without_a_look_at_the_pieces_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 94 layers with 128 experts would need half an hour: 24,000 reads that look at 24,000 pieces each."""
    looks, original = [], megatron_reader.create_read_items_for_chunk_list

    def counting(key: str, entry: Any, boxes: Any) -> Any:
        looks.append(len(entry.chunks))
        return original(key, entry, boxes)

    monkeypatch.setattr(megatron_reader, "create_read_items_for_chunk_list", counting)
    import_model(make_model(tmp_path / "model", "mixtral"), tmp_path / "checkpoint", verification="none")
    stored, architecture = MegatronDirectory(tmp_path / "checkpoint"), read_architecture(tmp_path / "checkpoint")
    stacked = [place(rule, architecture) for rule in rules(architecture).values() if rule.is_expert]
    assert len(stored.tensors[stacked[0].key].chunks) == 16
    for rule in rules(architecture).values():
        rows = megatron_shape(rule, architecture)[0]
        assert len(stored.rows_of(place(rule, architecture))(0, rows)) == rows
    assert set(looks) == {1}

"""The table of GPUs, and types that users add."""

from pathlib import Path

import pytest

from megatron_solopo.architecture.gpus import GPUS, bf16_peak, find_gpu, read_gpus
from megatron_solopo.errors import UserError

MINE = (
    "Mine: {device_name: Mine, memory_gib: 100, bf16_tflops: 500, hbm_gb_per_s: 2000, nvlink_gb_per_s: 100}\n"
    "h100: {device_name: H100, memory_gib: 40, bf16_tflops: 1, hbm_gb_per_s: 1, nvlink_gb_per_s: 1}\n"
)


def test_users_add_and_replace_types(tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text(MINE)
    gpus = read_gpus(path)
    assert find_gpu("mine", gpus).network_gb_per_s == 50 and find_gpu("H100", gpus).memory_gib == 40
    assert find_gpu("h200", gpus) == GPUS["h200"] and GPUS["h100"].memory_gib > 79


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mine: {memory_gib: 10}", "mine.device_name is required"),
        (MINE.replace("500", "-1"), "Mine.bf16_tflops"),
        (MINE.replace("500", ".inf"), "Mine.bf16_tflops"),
        ("mine: {speed: 1}", "the fields are device_name"),
        ("[1, 2]", "expected GPU types"),
        ("a: [", "not valid YAML"),
        ("3", "not valid YAML"),
        (MINE.replace("memory_gib: 100", "memory_gib: 100, memory_gib: 50"), "found duplicate key memory_gib"),
        (MINE + MINE, "found duplicate key Mine"),
        (MINE + MINE.replace("Mine", "MINE").replace("h100", "b"), "a type is there twice"),
    ],
)
def test_a_bad_type_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_gpus(path)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_type_and_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--gpu rtx: unknown; known: a100, h100-pcie"):
        find_gpu("rtx", GPUS)
    with pytest.raises(UserError, match="no such file"):
        read_gpus(tmp_path / "none.yaml")


def test_every_type_is_found_by_its_own_name() -> None:
    for gpu in GPUS.values():
        assert bf16_peak(f"NVIDIA {gpu.device_name}") == gpu.bf16_tflops * 1e12

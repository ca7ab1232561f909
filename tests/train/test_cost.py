"""FLOPs against torch's own counter on the transformers model; peak rates by device name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.config import ObjectiveConfig
from megatron_solopo.data.packing import Pack, TokenizedTriplet, build_pack
from megatron_solopo.train import metrics as cost
from megatron_solopo.train.metrics import peak_flops, peak_memory_bytes, training_flops
from tests.tiny_models import FAMILIES, VOCAB_SIZE

ROLES = ObjectiveConfig().roles.all
PROMPTS = {"short": 5, "long": 23}
RESPONSES = {"chosen": 4, "rejected": 7}
# (prompt, response) of the three sequences of a triplet.
SEQUENCES = ((5, 4), (5, 7), (23, 4))


def make_pack(triplets: int, multiple: int = 2) -> Pack:
    rows = [
        TokenizedTriplet(
            id=str(number),
            index=number,
            prompts={name: np.arange(length) for name, length in PROMPTS.items()},
            responses={name: np.arange(length) for name, length in RESPONSES.items()},
        )
        for number in range(triplets)
    ]
    return build_pack(rows, ROLES, multiple)


def read(path: Path, family: str) -> Architecture:
    FAMILIES[family].save_pretrained(path)
    return read_architecture(path)


def counted(family: str, prompt: int, response: int) -> float:
    """Forward and backward of one sequence by torch's counter, the output layer on the response's rows alone.

    transformers multiplies whole squares of queries and keys, of which a causal mask needs half, so
    attention's batched products count half.
    """
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager")
    tokens = torch.randint(VOCAB_SIZE, (1, prompt + response))
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens, logits_to_keep=response).logits.sum().backward()
    by_operation = counter.get_flop_counts()["Global"]
    attention = by_operation.pop(torch.ops.aten.bmm)
    return sum(by_operation.values()) + attention / 2


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen2_tied", "qwen3"])
def test_flops_are_those_that_torch_counts(family: str, tmp_path: Path) -> None:
    expected = sum(counted(family, *lengths) for lengths in SEQUENCES)
    assert training_flops(read(tmp_path, family), [make_pack(1)]) == pytest.approx(expected, rel=1e-12)


def test_flops_add_up_over_triplets_and_packs_and_ignore_padding(tmp_path: Path) -> None:
    architecture = read(tmp_path, "llama3")
    one = training_flops(architecture, [make_pack(1)])
    assert training_flops(architecture, [make_pack(3)]) == pytest.approx(3 * one)
    assert training_flops(architecture, [make_pack(1), make_pack(2, multiple=64)]) == pytest.approx(3 * one)
    assert training_flops(architecture, []) == 0


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H20", None),
    ],
)
def test_the_peak_rate_goes_by_the_devices_name(monkeypatch, device: str, expected: float | None) -> None:
    monkeypatch.setattr(cost, "is_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    assert peak_flops() == expected


def test_a_cpu_has_no_peak_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "is_cpu", lambda: True)
    assert peak_flops() is None


def test_peak_memory_of_a_cpu_is_resident_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "is_cpu", lambda: True)
    status = Path("/proc/self/status").read_text()
    (peak,) = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    assert peak_memory_bytes() == pytest.approx(peak, rel=0.05)

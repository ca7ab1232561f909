"""The device is the one asked for. What this CPU can do is found out, and told where it matters."""

from pathlib import Path

import pytest
import torch

from megatron_solopo import cpu_features
from megatron_solopo.cpu_features import DEVICE_VARIABLE, has_bfloat16_kernels, is_cpu, warn_about_slow_bfloat16
from megatron_solopo.errors import UserError

AVX512 = {"avx512vl", "avx512bw", "avx512dq"}
CPUINFO = Path("/proc/cpuinfo")


def flags() -> set[str]:
    """Abilities of an x86 processor, as Linux names them; empty elsewhere."""
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    return set(text.partition("flags")[2].partition("\n")[0].split())


@pytest.mark.skipif("avx2" not in flags(), reason="other processors name their abilities otherwise")
def test_kernels_for_bfloat16_need_avx512_or_conversions() -> None:
    if flags() >= AVX512:
        assert has_bfloat16_kernels()
    elif "avx_ne_convert" not in flags():
        assert not has_bfloat16_kernels()


def test_a_torch_without_onednn_has_no_kernels_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, where torch does not even have the question."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert has_bfloat16_kernels() is False


@pytest.mark.parametrize(
    ("has_kernels", "rank", "warns"), [(False, "0", True), (True, "0", False), (False, "1", False)]
)
def test_slow_bfloat16_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_kernels: bool, rank: str, warns: bool
) -> None:
    monkeypatch.setattr(cpu_features, "has_bfloat16_kernels", lambda: has_kernels)
    monkeypatch.setenv("RANK", rank)
    warn_about_slow_bfloat16("model.dtype=float32")
    told = "warning: torch has no kernels for bfloat16 on this CPU; model.dtype=float32 is several times as fast\n"
    assert capsys.readouterr().err == told * warns


@pytest.mark.parametrize(
    ("wanted", "has_cuda", "expected"),
    [
        (None, False, True),
        (None, True, False),
        ("", True, False),
        ("cpu", False, True),
        ("cpu", True, True),
        ("cuda", True, False),
    ],
)
def test_the_device_is_the_one_asked_for_or_else_cuda(monkeypatch, wanted, has_cuda, expected) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.delenv(DEVICE_VARIABLE, raising=False)
    if wanted is not None:
        monkeypatch.setenv(DEVICE_VARIABLE, wanted)
    assert is_cpu() is expected


@pytest.mark.parametrize("wanted", ["gpu", "CPU", "cuda:0", "0"])
def test_another_device_is_refused_by_name(monkeypatch, wanted) -> None:
    monkeypatch.setenv(DEVICE_VARIABLE, wanted)
    with pytest.raises(UserError, match=f"MEGATRON_SOLOPO_DEVICE='{wanted}': expected cpu or cuda"):
        is_cpu()


def test_cuda_where_there_is_none_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(DEVICE_VARIABLE, "cuda")
    with pytest.raises(UserError, match=r"MEGATRON_SOLOPO_DEVICE=cuda, but torch .* finds no CUDA device; unset it"):
        is_cpu()

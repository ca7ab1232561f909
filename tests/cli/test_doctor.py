"""The doctor on this machine, and on machines made up of planted packages."""

import importlib.metadata
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_solopo.cli import doctor
from megatron_solopo.cli.doctor import Check, Diagnosis, diagnose
from megatron_solopo.config import CheckpointConfig


def by_name(report: Diagnosis) -> dict[str, Check]:
    named = {check.name: check for check in report.checks}
    assert len(named) == len(report.checks), "two checks share a name"
    return named


def plant(
    monkeypatch: pytest.MonkeyPatch, folder: Path, distribution: str, version: str, files: dict[str, str]
) -> None:
    """Install a package of these files in front of sys.path."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)
    for module in {Path(name).parts[0].removesuffix(".py") for name in files}:
        for loaded in [each for each in sys.modules if each.startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)  # undone after the test, the planted one goes too
        del sys.modules[module]


def fake_version(monkeypatch: pytest.MonkeyPatch, distribution: str, version: str | None) -> None:
    real = importlib.metadata.version

    def lookup(name: str) -> str:
        if name != distribution:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", lookup)


@pytest.mark.parity
def test_this_machine_is_ready_and_fully_described() -> None:
    report = diagnose()
    checks = by_name(report)
    assert report.healthy, report.render()
    expected = {"python", "torch", "CUDA", "NCCL", "gloo", "megatron-core", "transformers", "datasets", "sentencepiece"}
    expected |= {
        "tensorboard",
        "transformer-engine",
        "flash-attn",
        "NVIDIA Apex",
        "deep_ep",
        "CPU bfloat16",
        "wandb",
        "CPU cores",
        "memory",
        "disk",
    }
    assert expected <= set(checks)
    for name in ("torch", "megatron-core", "transformers", "datasets"):
        assert checks[name].found == importlib.metadata.version(name)
    assert all(check.consequence and check.remedy for check in report.checks if check.status != "ok")


def test_json_holds_every_check() -> None:
    report = Diagnosis([Check("a", "ok", "1"), Check("b", "fail", "gone", "nothing runs", "pip install b")])
    assert json.loads(report.to_json()) == {
        "healthy": False,
        "checks": [
            {"name": "a", "status": "ok", "found": "1", "consequence": "", "remedy": ""},
            {"name": "b", "status": "fail", "found": "gone", "consequence": "nothing runs", "remedy": "pip install b"},
        ],
    }


@pytest.mark.parametrize("status", ["ok", "warn", "missing"])
def test_only_a_failure_is_unhealthy(status: doctor.CheckStatus) -> None:
    assert Diagnosis([Check("piece", status, "found")]).healthy
    assert not Diagnosis([Check("piece", status, "found"), Check("other", "fail", "gone")]).healthy


def test_the_table_is_aligned_and_within_the_width() -> None:
    cost = "costs a great deal of time on every step of every run"
    report = Diagnosis([Check("short", "ok", "1.0"), Check("a longer name", "missing", "no", cost, "install it")])
    lines = report.render(width=60).splitlines()
    assert max(len(line) for line in lines) <= 60
    column = lines[0].index("1.0")
    assert lines[1].index("no", len("missing  a longer name")) == column
    assert {len(line) - len(line.lstrip()) for line in lines if line.startswith(" ")} == {column}
    assert "fix: install it" in lines[-3] and lines[-1] == "ready"
    assert Diagnosis([Check("torch", "fail", "gone")]).render().endswith("not ready: torch")


def test_a_required_library_that_is_absent_fails_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_version(monkeypatch, "omegaconf", None)
    report = diagnose()
    assert not report.healthy
    assert by_name(report)["omegaconf"].found == "not installed"
    assert by_name(report)["omegaconf"].remedy == "pip install 'omegaconf>=2.3'"


def test_an_unsupported_megatron_core_fails_with_the_supported_range(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_version(monkeypatch, "megatron-core", "0.12.0")
    report = diagnose()
    check = by_name(report)["megatron-core"]
    assert (check.status, check.found) == ("fail", "0.12.0")
    supported = "==0.16.1" if sys.version_info < (3, 12) else ">=0.19.2"
    assert supported in check.consequence and supported in check.remedy
    assert not report.healthy


def test_a_required_library_that_does_not_import_fails_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = "raise OSError('libsomething.so: undefined symbol\\nmore detail')"
    plant(monkeypatch, tmp_path, "sentencepiece", "0.2.9", {"sentencepiece/__init__.py": broken})
    report = diagnose()
    checks = by_name(report)
    assert checks["sentencepiece"].found == "0.2.9 does not import: OSError: libsomething.so: undefined symbol"
    assert [check.name for check in report.checks if check.status == "fail"] == ["sentencepiece"]


def test_a_torch_that_does_not_import_leaves_the_other_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    report = diagnose()
    checks = by_name(report)
    assert checks["torch"].status == "fail" and checks["gloo"].status == "fail" and not report.healthy
    assert checks["numpy"].status == "ok" and "CUDA" not in checks


def test_an_optional_library_that_exits_on_import_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(monkeypatch, tmp_path, "wandb", "0.17.0", {"wandb.py": "raise SystemExit('no home directory')"})
    report = diagnose()
    assert by_name(report)["wandb"].status == "warn" and report.healthy
    assert "0.17.0 does not import: SystemExit: no home directory" in by_name(report)["wandb"].found


def test_what_a_library_prints_on_import_stays_off_stdout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, tmp_path, "wandb", "0.17.0", {"wandb.py": "print('a banner')"})
    assert by_name(diagnose())["wandb"] == Check("wandb", "ok", "0.17.0")
    captured = capsys.readouterr()
    assert captured.out == "" and "a banner" in captured.err


def test_the_pyramid_package_named_apex_is_told_from_nvidia_apex(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(monkeypatch, tmp_path, "apex", "0.9.10.dev0", {"apex/__init__.py": "raise ImportError('never imported')"})
    check = by_name(diagnose())["NVIDIA Apex"]
    assert check.status == "warn" and "0.9.10.dev0 is not NVIDIA's" in check.found
    assert check.remedy == "pip uninstall apex"


@pytest.mark.parametrize(
    ("extensions", "status", "found"),
    [
        (["amp_C.py", "fused_weight_gradient_mlp_cuda.py"], "ok", "0.1"),
        (["amp_C.py"], "warn", "built without fused_weight_gradient_mlp_cuda"),
        ([], "warn", "built without amp_C and fused_weight_gradient_mlp_cuda"),
    ],
)
def test_nvidia_apex_and_its_extensions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, extensions: list[str], status: str, found: str
) -> None:
    files = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "", **dict.fromkeys(extensions, "")}
    plant(monkeypatch, tmp_path, "apex", "0.1", files)
    check = by_name(diagnose())["NVIDIA Apex"]
    assert (check.status, check.found) == (status, found)


def test_fp8_is_what_transformer_engine_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recipe has its own question: with CUDA 12.8 a Hopper GPU has FP8, but not the default recipe."""
    import torch

    def ask(**reasons: str) -> doctor.Check:
        answers = {f"is_{name}_available": (not reason, reason) for name, reason in reasons.items()}
        return doctor._fp8(SimpleNamespace(**{n: lambda return_reason, a=a: a for n, a in answers.items()}))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    old = "Device compute capability 8.9 or higher required for FP8 execution."
    hopper = ask(fp8="", fp8_block_scaling="", mxfp8="needs Blackwell")
    early = ask(fp8="", fp8_block_scaling="needs\nCUDA 12.9.", mxfp8="needs Blackwell")
    ampere = ask(fp8=old, fp8_block_scaling="x", mxfp8="x")
    unable = doctor._fp8(SimpleNamespace())
    assert [each.status for each in (hopper, early, ampere, unable)] == ["ok", "warn", "missing", "warn"]
    assert hopper.found == "works on this device: blockwise, tensorwise, delayed"
    assert "not blockwise, the default: needs CUDA 12.9" in early.found and "tensorwise, delayed" in str(early.remedy)
    assert ampere.found == old.rstrip(".") and "AttributeError" in unable.found


def test_a_transformer_engine_that_does_not_import_costs_speed_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": "import no_such_library"}
    plant(monkeypatch, tmp_path, "transformer-engine", "2.9.0", files)
    report = diagnose()
    check = by_name(report)["transformer-engine"]
    assert report.healthy and check.status == "warn" and "no_such_library" in check.found
    assert "slower" in check.consequence and "[te]" in check.remedy


def test_devices_of_a_gpu_machine_are_listed() -> None:
    hopper = SimpleNamespace(name="H100", total_memory=80 * 1024**3, major=9, minor=0)
    volta = SimpleNamespace(name="V100", total_memory=16 * 1024**3, major=7, minor=0)
    cuda = SimpleNamespace(init=lambda: None, device_count=lambda: 2, get_device_properties=[hopper, volta].__getitem__)
    checks = list(doctor._gpus(SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0"))))
    assert [(check.name, check.status) for check in checks] == [("CUDA", "ok"), ("GPU 0", "ok"), ("GPU 1", "warn")]
    assert checks[1].found == "H100, 80 GiB, compute capability 9.0"


def test_a_cpu_without_kernels_for_bfloat16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_fast, status in ((True, "ok"), (False, "missing")):
        monkeypatch.setattr(doctor, "has_bfloat16_kernels", lambda is_fast=is_fast: is_fast)
        assert by_name(diagnose())["CPU bfloat16"].status == status


def test_a_driver_that_does_not_start_is_reported_with_its_reason() -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    torch = SimpleNamespace(cuda=SimpleNamespace(init=init), version=SimpleNamespace(cuda="13.0"))
    (check,) = doctor._gpus(torch)
    assert check.status == "missing" and "too old" in check.found and "gloo" in check.consequence


def test_little_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=14 * 10**8))
    (disk,) = (check for check in doctor._machine() if check.name == "disk")
    assert disk.status == "warn" and "up to 0.1 billion parameters" in disk.found
    assert "the 4 of checkpoint.keep_last=3 and a running save for up to 0.025 billion" in disk.found
    assert CheckpointConfig().keep_last + 1 == doctor._CHECKPOINTS
    assert "checkpoint.keep_last" in disk.remedy and "run_dir" in disk.remedy


def test_supported_versions_are_those_of_pyproject() -> None:
    declared = {requirement.name: str(requirement.specifier) for requirement in doctor._declared_requirements()}
    assert declared["transformers"] in (">=5.22,<6", "<6,>=5.22")
    assert "torch" in declared and "pytest" not in declared and "wandb" not in declared

"""What the project asks of a GPU beside its layers: settings before CUDA starts, checks, devices of whole models."""

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformer_engine.pytorch as engine
from click.testing import CliRunner
from packaging.version import Version

import megatron_solopo.model.resolve as resolve
from megatron_solopo.cli.main import cli
from megatron_solopo.config import ModelConfig, OptimizerConfig, ParallelConfig, parse_config
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.long_context import evaluate_long_context
from megatron_solopo.evaluation_settings import LongContextSettings
from megatron_solopo.parallel import topology
from megatron_solopo.train.policy import check_offload
from megatron_solopo.train.session import check_and_join
from megatron_solopo.triplets.sample import sample
from megatron_solopo.triplets.settings import SampleSettings
from tests.evaluate.evaluation_models import make_model as make_small_model
from tests.gpu.models import make_model
from tests.triplets.context_files import context, write_lines

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
KERNEL_CHOICE = "transformer_engine.pytorch.attention.dot_product_attention.utils"
TE = {"dtype": "bfloat16", "implementation": "transformer_engine"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2_tied", seed=0)


def test_cuda_starts_with_the_runs_settings_and_on_the_ranks_device(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's allocator reads its settings when CUDA starts. Transformer Engine's answer about FP8 starts it."""
    found, devices = [], []
    monkeypatch.delenv(ALLOCATOR, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)

    def available(return_reason: bool) -> tuple[bool, str]:
        found.append((os.environ.get(ALLOCATOR), list(devices)))
        return True, ""

    monkeypatch.setattr(engine, "is_fp8_block_scaling_available", available)
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": TE | {"path": str(model), "fp8": "hybrid", "fp8_recipe": "blockwise"},
        "data": {"path": str(tmp_path / "missing"), "max_tokens_per_pack": 400},
        "training": {"global_batch_size": 4},
    }
    with pytest.raises(UserError, match="missing"):
        check_and_join(parse_config(values, "test"))
    assert found == [("expandable_segments:True", [torch.device("cuda", 3)])]


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(UserError, match="LOCAL_RANK=8: this process sees 8 CUDA devices"):
        topology.prepare_device(ParallelConfig())


def test_groups_of_another_program_are_taken_with_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = topology.initialize(ParallelConfig(), seed=1)
    try:
        assert topology.current().device == groups.device == torch.device("cuda", 0)
    finally:
        topology.destroy(groups)


def unavailable(return_reason: bool) -> tuple[bool, str]:
    return False, "Device compute capability 9.0 or higher required."


@pytest.mark.parametrize(
    ("replaced", "settings", "message"),
    [
        ({"has_transformer_engine": lambda: False}, TE, "needs the package transformer-engine, which is not installed"),
        ({}, TE | {"dtype": "float32"}, "needs model.dtype=bfloat16"),
        ({}, {"dtype": "bfloat16", "implementation": "local", "fp8": "hybrid"}, "needs Transformer Engine on a CUDA"),
        (
            {"importlib": SimpleNamespace(import_module=lambda name: SimpleNamespace())},
            TE | {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
            r"this Transformer Engine is too old for it; the nearest is model.fp8=null \(bfloat16\)",
        ),
    ],
)
def test_what_these_layers_cannot_do_is_refused(
    replaced: dict, settings: dict, message: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in replaced.items():
        monkeypatch.setattr(resolve, name, value)
    with pytest.raises(UserError, match=message):
        resolved = resolve.resolve_model(ModelConfig(path=model, **settings), ParallelConfig())
        resolve.check_precision(resolved, OptimizerConfig())


def test_older_packages_and_plain_layers_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fp8 = ModelConfig(path=model, **TE, fp8="hybrid", fp8_recipe="blockwise", fp8_param=True)
    monkeypatch.setattr(resolve, "installed_version", lambda: Version("0.16.1"))
    with pytest.raises(UserError, match=r"fp8_param=true needs megatron-core .* 0\.16\.1 is installed"):
        resolve.check_precision(resolve.resolve_model(fp8, ParallelConfig()), OptimizerConfig())
    plain = resolve.resolve_model(ModelConfig(path=model, implementation="local"), ParallelConfig())
    with pytest.raises(UserError, match=r"optimizer_offload_fraction=0\.5 needs a CUDA device"):
        check_offload(OptimizerConfig(optimizer_offload_fraction=0.5), plain)


def test_masks_of_shared_prompts_are_asked_of_transformer_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve.resolve_model(ModelConfig(path=model, **TE), ParallelConfig())
    shared, separate = (
        parse_config(
            {
                "run_dir": "run",
                "model": {"path": model},
                "data": {"path": "prepared", "max_tokens_per_pack": 100, "share_prompts": share_prompts},
                "training": {"global_batch_size": 1, "max_steps": 1},
            },
            source="test",
        )
        for share_prompts in (True, False)
    )
    resolve.check_attention(resolved, shared)
    found = importlib.import_module(KERNEL_CHOICE)
    monkeypatch.setattr(found, "get_attention_backend", lambda asked: (False, None, False, None, False, [False] * 3))
    with pytest.raises(UserError, match=r"no attention kernel of .* computes here .*set data\.share_prompts=false"):
        resolve.check_attention(resolved, shared)
    monkeypatch.delattr(found, "AttentionParams")  # an older version keeps it elsewhere
    with pytest.raises(UserError, match=r"set data\.share_prompts=false"):
        resolve.check_attention(resolved, shared)
    resolve.check_attention(resolved, separate)


def test_the_nearest_recipe_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "is_fp8_block_scaling_available", unavailable)
    settings = ModelConfig(path=model, **TE, fp8="hybrid", fp8_recipe="blockwise")
    with pytest.raises(UserError, match=r"9\.0 or higher required; the nearest is model\.fp8_recipe="):
        resolve.check_precision(resolve.resolve_model(settings, ParallelConfig()), OptimizerConfig())


def test_doctor_describes_each_gpu() -> None:
    found = CliRunner().invoke(cli, ["doctor"])
    assert found.exit_code == 0, found.output
    assert "GPU 7" in found.output and "emulated H100, 80 GiB, compute capability 9.0" in found.output
    assert "works on this device: blockwise, tensorwise," in found.output


def test_doctor_reports_gpus_that_are_too_old_or_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    volta = SimpleNamespace(name="V100", total_memory=16 << 30, major=7, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: volta)
    assert "no bfloat16 tensor cores" in CliRunner().invoke(cli, ["doctor"]).output

    def fail() -> None:
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch.cuda, "init", fail)
    assert "no usable device" in CliRunner().invoke(cli, ["doctor"]).output


def test_models_of_transformers_answer_on_the_gpu(tmp_path: Path) -> None:
    path = make_small_model(tmp_path / "model")
    asked = {"tasks": ("needle_single",), "lengths": (700,), "depths": (0.0,), "samples": 1, "max_new_tokens": 4}
    settings = LongContextSettings(
        model=str(path), backend="transformers", output=tmp_path / "r.json", batch_size=1, **asked
    )
    found = evaluate_long_context(settings)
    assert found is not None and found.device == "emulated H100"
    contexts = write_lines(tmp_path / "contexts.jsonl", [context(0, chat=False)])
    responses = tmp_path / "responses.jsonl"
    sample(SampleSettings(contexts=contexts, output=responses, model=str(path), num_samples=2, max_tokens=4))
    assert len(responses.read_text().splitlines()) == 1 + 2  # what the file is for, and the answers

"""Every family: there and back is the same bit by bit, and between the two it is the same model under any layout."""

import filecmp
import functools
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.checkpoint import mapping
from megatron_solopo.checkpoint.conversion import export_model, import_model, verify_models
from megatron_solopo.checkpoint.fingerprint import weights_fingerprint
from megatron_solopo.checkpoint.huggingface_weights import bitwise_equal
from megatron_solopo.checkpoint.load import global_parameters, load_weights
from megatron_solopo.checkpoint.megatron_reader import MegatronDirectory
from megatron_solopo.checkpoint.verify import Verification
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.model.build import build_model
from megatron_solopo.model.resolve import resolve_model
from tests.distributed import run_distributed
from tests.prepared import make_tokenizer
from tests.ranks import layout
from tests.scoring import expected, joined, score_path
from tests.tiny_models import FAMILIES, make_model

TP2, PP2, CP2 = (
    {f"{name}_parallel_size": 2} for name in ("tensor_model", "pipeline_model", "context")
)  # fmt: skip
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"tp1": {}},
    2: {"tp2": TP2, "pp2": PP2, "vpp2": PP2 | {"virtual_pipeline_model_parallel_size": 2}, "cp2": CP2},
    # More tensor-parallel ranks than key-value heads.
    4: {"tp4": {"tensor_model_parallel_size": 4}, "tp2-pp2": TP2 | PP2},
}
# Files are read and written without Megatron. What its versions do with them shows on one and on two ranks.
CASES = [
    pytest.param(world, name, marks=[pytest.mark.parity] if world < 4 else [])
    for world, layouts in LAYOUTS.items()
    for name in layouts
]
# Log-probabilities of about -5 in fp32.
TOLERANCE = 2e-5
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# The others are scored too, by the tests below. The command's own comparison starts a process each time.
VERIFIED_WITH_LOGITS = ("llama3_tied", "qwen2_yarn")
OTHER_TEMPLATE = "additional_chat_templates/tool.jinja"


@functools.cache
def converted(family: str) -> Path:
    """A folder with the source, what it was imported to (verified), and what that was exported to."""
    folder = Path(tempfile.mkdtemp(dir=_root())) / family
    make_tokenizer(make_model(folder / "source", family))
    (folder / "source" / "chat_template.jinja").write_text("{{ messages }}\n")
    (folder / "source" / "additional_chat_templates").mkdir()
    (folder / "source" / OTHER_TEMPLATE).write_text("{{ tools }}\n")
    for left in ("README.md", "modeling.py", "training_args.bin"):
        (folder / "source" / left).write_text("not carried")
    verification: Verification = "full" if family in VERIFIED_WITH_LOGITS else "tensors"
    report = import_model(folder / "source", folder / "megatron", verification=verification)
    assert ("greatest relative error" in dict(report.rows)["logits"]) is (verification == "full")
    export_model(folder / "megatron", folder / "exported", dtype=None, verification=verification)
    return folder


@functools.cache
def _root() -> str:
    return tempfile.mkdtemp()


@functools.cache
def scores(world: int) -> dict[tuple[str, str], Tensor]:
    """By family and layout; one launch per world size."""
    folders = {family: converted(family) / "megatron" for family in FAMILIES}
    ranks = run_distributed(_score_all, world, folders, LAYOUTS[world])
    return {case: joined([each[case] for each in ranks]) for case in ranks[0]}


def _score_all(folders: dict[str, Path], layouts: dict[str, Any]) -> dict[tuple[str, str], Tensor | None]:
    return {
        (family, name): score_path(path, parallel)
        for family, path in folders.items()
        for name, parallel in layouts.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("world", "name"), CASES)
def test_an_imported_model_is_transformers_own(world: int, name: str, family: str) -> None:
    found, wanted = scores(world)[family, name], expected(converted(family) / "source")
    assert found.shape == wanted.shape and bool((wanted < -0.1).any())
    assert float((found - wanted).abs().max()) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_bit_by_bit(family: str) -> None:
    folder = converted(family)
    source, exported = (load_file(folder / name / "model.safetensors") for name in ("source", "exported"))
    assert source.keys() == exported.keys()
    for name, tensor in source.items():
        assert bitwise_equal(exported[name], tensor), name
    for name in {*SMALL_FILES, OTHER_TEMPLATE} - {"config.json", "tokenizer_config.json"}:
        assert (folder / "exported" / name).read_bytes() == (folder / "source" / name).read_bytes(), name
    found = {path.name for path in (folder / "exported").iterdir()}
    assert found == {*SMALL_FILES, "additional_chat_templates", "model.safetensors"}
    assert torch.equal(expected(folder / "exported"), expected(folder / "source"))
    source_tokenizer, exported_tokenizer = (
        AutoTokenizer.from_pretrained(folder / name) for name in ("source", "exported")
    )
    assert exported_tokenizer.get_vocab() == source_tokenizer.get_vocab()
    assert exported_tokenizer.chat_template == source_tokenizer.chat_template
    assert exported_tokenizer.get_chat_template() == "{{ messages }}\n"


@pytest.mark.parametrize("block_bytes", [1, 3000])
@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_blocks_of_any_size_make_the_same_model(family: str, block_bytes: int, tmp_path: Path, monkeypatch) -> None:
    """Written in small blocks and read in large ones, and the other way round."""
    folder = converted(family)
    with monkeypatch.context() as patch:
        patch.setattr(mapping, "_BLOCK_BYTES", block_bytes)
        import_model(folder / "source", tmp_path / "small", verification="tensors")
        export_model(folder / "megatron", tmp_path / "from large", dtype=None, verification="none")
    export_model(tmp_path / "small", tmp_path / "from small", dtype=None, verification="none")
    assert len(list(MegatronDirectory(tmp_path / "small").pieces())) > len(
        list(MegatronDirectory(folder / "megatron").pieces())
    )
    for name in ("from large", "from small"):
        assert filecmp.cmp(tmp_path / name / "model.safetensors", folder / "exported" / "model.safetensors", False)


def test_an_import_leaves_out_the_checksums_that_nobody_reads() -> None:
    """They take longer than the writing; the option that turns them off belongs to a thread."""
    piece = next(iter(MegatronDirectory(converted("llama3") / "megatron").pieces()))
    content = piece.file.read_bytes()[piece.start : piece.start + piece.length]
    with zipfile.ZipFile(io.BytesIO(content)) as stored, pytest.raises(zipfile.BadZipFile, match="CRC"):
        stored.read(next(name for name in stored.namelist() if name.endswith("/data/0")))


def test_conversion_imports_no_megatron() -> None:
    """Its import takes longer than the conversion of a small model."""
    program = "import sys, megatron_solopo.checkpoint.conversion; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "megatron.core" not in loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotation_travels_with_the_checkpoint(family: str) -> None:
    folder = converted(family)
    found = read_architecture(folder / "megatron")
    rotary = AutoModelForCausalLM.from_pretrained(folder / "source").model.rotary_emb
    assert torch.equal(found.inv_freq, rotary.inv_freq) and found.rotary_scale == rotary.attention_scaling


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama3", "qwen2_tied", "qwen3"])
def test_megatrons_own_loader_needs_no_help(family: str) -> None:
    """Every key that the model asks for is there, whatever else Megatron keeps beside weights."""
    folder = converted(family)
    with layout() as groups:
        (model,) = build_model(
            resolve_model(ModelConfig(path=folder / "megatron"), ParallelConfig()),
            chunk_tokens=8,
            device=groups.device,
        )
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "megatron"))
        model.load_state_dict(state["model"])
        final = dict(global_parameters(model))["decoder.final_layernorm.weight"]
    assert torch.equal(final, load_file(folder / "source" / "model.safetensors")["model.norm.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama3_tied", "qwen2", "qwen3"])
def test_a_checkpoint_loads_as_its_source_does(family: str, dtype: Any) -> None:
    """In the precision of the model, padding included."""
    folder, found = converted(family), []
    with layout() as groups:
        for path in (folder / "source", folder / "megatron"):
            config = ModelConfig(path=path, dtype=dtype)
            (model,) = build_model(resolve_model(config, ParallelConfig()), chunk_tokens=8, device=groups.device)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(torch.nan)
            load_weights([model], read_architecture(path), path)
            found.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, parameter in found[0].items():
        assert parameter.dtype is getattr(torch, dtype) and bitwise_equal(parameter, found[1][name]), name


def test_what_reads_a_models_small_files_reads_a_checkpoints() -> None:
    folder = converted("qwen3")
    prints = [load_tokenizer(folder / name).fingerprint for name in ("source", "megatron")]
    assert prints[0] == prints[1]


def test_a_checkpoints_fingerprint_is_its_weights(tmp_path: Path) -> None:
    """The same wherever it lies; another one with any tensor, and with the config."""
    source = tmp_path / "source"
    shutil.copytree(converted("qwen3") / "source", source)
    prints = {weights_fingerprint(converted("qwen3") / "megatron")}
    tensors = load_file(source / "model.safetensors")
    import_model(source, tmp_path / "same", verification="none")
    assert {weights_fingerprint(tmp_path / "same")} == prints
    names = ["model.embed_tokens.weight", "model.layers.3.self_attn.k_norm.weight", "model.layers.0.mlp.up_proj.weight"]
    for number, name in enumerate(names):
        edited = tensors | {name: tensors[name] * 1.001}
        save_file(edited, source / "model.safetensors")
        import_model(source, tmp_path / str(number), verification="none")
        prints.add(weights_fingerprint(tmp_path / str(number)))
    (tmp_path / "same" / "huggingface" / "config.json").write_text("{}")
    prints.add(weights_fingerprint(tmp_path / "same"))
    assert len(prints) == len(names) + 2


def stored_in(folder: Path, dtype: torch.dtype, path: Path) -> Path:
    """A copy of a source in another precision, as published models have it."""
    AutoModelForCausalLM.from_pretrained(folder / "source", dtype=dtype).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_precision_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    source = stored_in(converted("qwen2"), dtype, tmp_path / "source")
    import_model(source, tmp_path / "megatron", verification="tensors")
    report = export_model(tmp_path / "megatron", tmp_path / "exported", dtype=None, verification="tensors")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "exported"))
    assert all(bitwise_equal(after[name], tensor) for name, tensor in before.items())
    assert dict(report.rows)["precision"] == f"51 {str(dtype).removeprefix('torch.')} in both"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_export_can_change_the_precision_and_says_so(dtype: Any, tmp_path: Path) -> None:
    source = converted("llama3")
    report = export_model(source / "megatron", tmp_path / "exported", dtype=dtype, verification="full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    wanted = AutoModelForCausalLM.from_pretrained(source / "source", dtype=getattr(torch, dtype))
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == dtype
    for name, parameter in wanted.named_parameters():
        assert bitwise_equal(model.get_parameter(name).detach(), parameter.detach()), name
    assert f"{dtype} in " in dict(report.rows)["precision"]
    assert ("rounded" in dict(report.rows)["precision"]) is (dtype != "float32")
    assert "greatest relative error" in dict(report.rows)["logits"]
    qualified = f" after rounding to {dtype}" if dtype != "float32" else ""
    assert dict(report.rows)["tensors"] == f"39 of 39 bitwise equal{qualified}"
    assert (f"(checkpoint rounded to {dtype})" in dict(report.rows)["logits"]) is (dtype != "float32")


@pytest.mark.parametrize("edit", ["bit", "config"])
def test_verify_finds_what_differs(edit: str, tmp_path: Path) -> None:
    folder = converted("qwen3")
    shutil.copytree(folder / "source", tmp_path / "hf")
    assert not verify_models(tmp_path / "hf", folder / "megatron", logits=False).failures
    if edit == "bit":
        tensors = load_file(tmp_path / "hf" / "model.safetensors")
        tensors["model.layers.2.self_attn.k_proj.weight"].view(torch.int32)[3, 5] ^= 1
        save_file(tensors, tmp_path / "hf" / "model.safetensors")
        words = ["1 tensor differs: model.layers.2.self_attn.k_proj.weight"]
    else:
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 5e5
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
        words = ["config.json differs in inv_freq"]
    (failure,) = verify_models(tmp_path / "hf", folder / "megatron", logits=True).failures
    assert all(word in failure for word in words)

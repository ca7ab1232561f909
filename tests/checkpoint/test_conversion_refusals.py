"""Whatever stands in the way of a conversion is told in one line, and leaves nothing that looks complete."""

import errno
import itertools
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from megatron_solopo.checkpoint import conversion, verify
from megatron_solopo.checkpoint.conversion import export_model, import_model
from megatron_solopo.checkpoint.huggingface_weights import SafetensorsDirectory
from megatron_solopo.checkpoint.megatron_reader import read_metadata
from megatron_solopo.cli.main import main
from tests.conversions import QUERY, WEIGHTS, change, change_config, refusal


def refused_import(folder: Path) -> str:
    return refusal(folder, lambda: import_model(folder / "hf", folder / "out", verification="full"))


def refused_export(folder: Path, dtype: Any = None) -> str:
    return refusal(
        folder, lambda: export_model(folder / "megatron", folder / "out", dtype=dtype, verification="tensors")
    )


def scaled_rope(kind: str) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda hf: change_config(hf, model_type="gpt2"),
            ["model_type='gpt2'", "llama, mistral, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe"],
        ),
        (lambda hf: change_config(hf, rope_parameters=scaled_rope("dynamic")), ["rope_type='dynamic'", "llama3, yarn"]),
        (lambda hf: change(hf / WEIGHTS, lambda each: each.pop(QUERY)), ["1 missing tensor for", QUERY]),
        (
            lambda hf: change(hf / WEIGHTS, lambda each: each.update({"extra.weight": torch.ones(2)})),
            ["1 unexpected tensor for", "extra.weight"],
        ),
        (
            lambda hf: change(hf / WEIGHTS, lambda each: each.update({QUERY: each[QUERY].bfloat16()})),
            ["stored as F32", f"{QUERY} as BF16", "one precision"],
        ),
        (
            lambda hf: change(hf / WEIGHTS, lambda each: each.update({QUERY: each[QUERY].to(torch.float8_e4m3fn)})),
            [f"{QUERY} is stored as F8_E4M3", "BF16, F16, F32"],
        ),
        (
            lambda hf: change(hf / WEIGHTS, lambda each: each.update({"lm_head.weight": torch.ones(131, 32)})),
            ["lm_head.weight", "differ", "tie_word_embeddings"],
        ),
        (lambda hf: (hf / WEIGHTS).write_bytes((hf / WEIGHTS).read_bytes()[:-1]), [WEIGHTS, "cannot be read"]),
    ],
)
def test_what_cannot_be_imported(damage: Callable[[Path], object], words: list[str], folder: Path) -> None:
    damage(folder / "hf")
    message = refused_import(folder)
    assert message.startswith(str(folder / "hf")) and all(word in message for word in words), message


def test_what_follows_from_the_rest_is_not_carried(folder: Path) -> None:
    """Tied embeddings that are stored twice, and rotary frequencies, as old checkpoints have them."""
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64)}
    change(
        folder / "hf" / WEIGHTS,
        lambda each: each.update(derived | {"lm_head.weight": each["model.embed_tokens.weight"].clone()}),
    )
    import_model(folder / "hf", folder / "out", verification="full")
    export_model(folder / "out", folder / "back", dtype=None, verification="tensors")
    assert set(load_file(folder / "hf" / WEIGHTS)) - set(load_file(folder / "back" / WEIGHTS)) == {
        "lm_head.weight",
        *derived,
    }


def cut(folder: Path, pattern: str, kept: Callable[[bytes], bytes]) -> None:
    file = max(folder.glob(pattern), key=lambda each: each.stat().st_size)
    file.write_bytes(kept(file.read_bytes()))


def unreadable_without_a_manifest(folder: Path) -> None:
    cut(folder, "*.distcp", lambda content: bytes(len(content)))
    (folder / "manifest.json").unlink()


class Evil(NamedTuple):
    """Pickles into a call of `os.system`."""

    command: str

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda ck: (ck / "metadata.json").unlink(), ["is no complete Megatron checkpoint", "metadata.json"]),
        (lambda ck: (ck / ".metadata").write_bytes(b"torn"), [".metadata: cannot be read"]),
        (lambda ck: (ck / ".metadata").write_bytes(pickle.dumps({"a": 1})), [".metadata: is no list"]),
        (lambda ck: (ck / "__1_0.distcp").unlink(), ["__1_0.distcp: is missing", "damaged"]),
        (lambda ck: cut(ck, "*.distcp", lambda content: content[:-1]), ["is cut short", "damaged"]),
        (lambda ck: cut(ck, "*.distcp", lambda content: bytes(len(content))), ["another checksum", "damaged"]),
        (unreadable_without_a_manifest, ["cannot be read", "damaged"]),
        (lambda ck: change_config(ck / "huggingface", intermediate_size=64), ["shape (4, 96, 32)", "(4, 128, 32)"]),
        (lambda ck: change_config(ck / "huggingface", tie_word_embeddings=False), ["1 missing", "output_layer.weight"]),
        (lambda ck: (ck / "huggingface" / "megatron_solopo.json").unlink(), ["megatron_solopo.json", "--dtype"]),
        (lambda ck: (ck / "huggingface" / "config.json").unlink(), ["huggingface/config.json: no such file"]),
    ],
)
def test_what_cannot_be_exported(damage: Callable[[Path], object], words: list[str], folder: Path) -> None:
    damage(folder / "megatron")
    message = refused_export(folder)
    assert all(word in message for word in [str(folder / "megatron"), *words]), message


def test_a_checkpoints_list_of_pieces_runs_no_code(folder: Path) -> None:
    (folder / "megatron" / ".metadata").write_bytes(pickle.dumps(Evil(f"touch {folder}/ran")))
    assert "system, which has no place in a checkpoint" in refused_export(folder)
    assert not (folder / "ran").exists()


class AttributeOfClass:
    def __reduce__(self) -> Any:
        return getattr, (torch.Size, "__class__")


def test_a_checkpoints_list_of_pieces_names_no_attribute_of_a_class(folder: Path) -> None:
    (folder / "megatron" / ".metadata").write_bytes(pickle.dumps(AttributeOfClass()))
    assert "asks for '__class__'" in refused_export(folder)


class EarlyPickler(pickle.Pickler):
    """Names members of enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_a_checkpoint_of_an_early_python_3_11_is_read(folder: Path) -> None:
    file = folder / "megatron" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    with file.open("wb") as stream:
        EarlyPickler(stream).dump(metadata)
    assert b"getattr" in file.read_bytes()
    assert read_metadata(folder / "megatron") == metadata


def test_numbers_beyond_the_range_of_float16_are_refused(folder: Path) -> None:
    change(folder / "hf" / WEIGHTS, lambda each: each[QUERY].fill_(1e6))
    shutil.rmtree(folder / "megatron")
    import_model(folder / "hf", folder / "megatron", verification="tensors")
    message = refused_export(folder, "float16")
    assert QUERY in message and "float16" in message and "bfloat16" in message


def test_an_existing_output_is_not_touched(folder: Path) -> None:
    (folder / "out").mkdir()
    for message in (refused_import(folder), refused_export(folder)):
        assert message.startswith(f"{folder / 'out'}: exists already") and "--out" in message


def test_too_little_space_is_told_before_anything_is_written(folder, monkeypatch) -> None:
    monkeypatch.setattr(
        conversion.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    )
    for message in (refused_import(folder), refused_export(folder)):
        assert re.search(r"needs \d+,\d{3} bytes, but 1,000 bytes are free", message)


def test_a_disk_that_fills_up_meanwhile_is_one_line(folder, monkeypatch) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(conversion.SafetensorsWriter, "write", full)
    monkeypatch.setattr(SafetensorsDirectory, "read", full)
    for message in (refused_import(folder), refused_export(folder)):
        assert "no space was left" in message and "nothing of it was kept" in message


@pytest.mark.parametrize("module", ["import", "export"])
def test_what_does_not_verify_is_not_kept(module: str, folder, monkeypatch) -> None:
    """As if something had damaged the numbers on their way."""
    to_dtype = verify.to_dtype
    monkeypatch.setattr(verify, "to_dtype", lambda name, tensor, dtype: to_dtype(name, tensor, dtype) + (name == QUERY))
    message = refused_import(folder) if module == "import" else refused_export(folder)
    assert "out: was not written" in message and f"1 tensor differs: {QUERY}" in message


def test_other_logits_are_not_kept(folder, monkeypatch) -> None:
    """As if our model computed something else from the same numbers."""
    monkeypatch.setattr(verify, "_round", lambda model, *more: model.rotary_pos_emb.inv_freq.mul_(1.001))
    assert "logits differ by" in refused_import(folder)


def test_a_model_too_large_for_memory_is_said_to_be_unscored(folder, monkeypatch) -> None:
    monkeypatch.setattr(verify.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**6}))
    report = import_model(folder / "hf", folder / "out", verification="full")
    assert "skipped: the model in fp32 needs 1.0 GiB of memory, 0.0 GiB" in dict(report.rows)["logits"]


@pytest.mark.parametrize("work", ["import", "export"])
def test_an_interrupted_conversion_leaves_nothing_and_can_be_run_again(work: str, folder, monkeypatch) -> None:
    def run() -> None:
        if work == "import":
            import_model(folder / "hf", folder / "out", verification="tensors")
        else:
            export_model(folder / "megatron", folder / "out", dtype=None, verification="tensors")

    before = sorted(path.name for path in folder.iterdir())
    count = itertools.count()

    def interrupted(*arguments: Any) -> None:
        if next(count) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(conversion.tqdm, "update", interrupted)
        run()
    assert sorted(path.name for path in folder.iterdir()) == before
    run()


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_solopo.checkpoint import conversion
conversion.tqdm.update = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
conversion.import_model(Path(sys.argv[1]), Path(sys.argv[2]), verification="none")
"""


def test_a_killed_conversion_leaves_nothing_that_looks_complete(folder: Path) -> None:
    out = folder / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder / "hf"), str(out)], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    (left,) = [path for path in folder.iterdir() if path.name.startswith(".out.incomplete-")]
    assert not (left / "metadata.json").exists()
    import_model(folder / "hf", out, verification="tensors")
    assert not left.exists()


def test_the_commands(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("MEGATRON_SOLOPO_DEVICE", "cpu")
    hf, out, back = (str(folder / name) for name in ("hf", "out", "back"))
    main(["convert", "import", "--hf", hf, "--out", out, "--verify", "tensors"])
    assert "50 of 50 bitwise equal" in capsys.readouterr().out
    main(["convert", "export", "--checkpoint", out, "--out", back, "--dtype", "bfloat16"])
    assert "rounded" in capsys.readouterr().out
    main(["convert", "verify", "--hf", back, "--checkpoint", out, "--no-logits"])
    assert "skipped: not asked for" in capsys.readouterr().out
    change(Path(back) / WEIGHTS, lambda each: each[QUERY].fill_(1.0))
    with pytest.raises(SystemExit) as exit_:
        main(["convert", "verify", "--hf", back, "--checkpoint", out])
    streams = capsys.readouterr()
    assert exit_.value.code == 1 and "49 of 50 bitwise equal after rounding to bfloat16 FAILED" in streams.out
    assert streams.err.splitlines()[-1].startswith("error: ") and QUERY in streams.err
    with pytest.raises(SystemExit) as exit_:
        main(["convert", "import", "--hf", str(folder / "megatron"), "--out", str(folder / "x")])
    assert exit_.value.code == 2 and "is a Megatron checkpoint already" in capsys.readouterr().err

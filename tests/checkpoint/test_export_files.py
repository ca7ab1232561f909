"""An export names only what it holds, states what its weights are, and loads under transformers' strictest settings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.architecture.model_directory import has_tokenizer
from megatron_solopo.checkpoint.conversion import export_model, import_model, verify_models
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.errors import UserError
from tests.conversions import WEIGHTS, change, change_config
from tests.prepared import make_tokenizer
from tests.scoring import expected
from tests.tiny_models import FAMILIES, make_model

OWN_CLASSES = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
CONFIGURATION = "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    pass\n"
MODELING = (
    "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
)


def round_trip(source: Path, out: Path) -> tuple[Path, list[str]]:
    """The export of the import of `source`, and its notes."""
    import_model(source, out / "megatron", verification="none")
    report = export_model(out / "megatron", out / "exported", dtype=None, verification="tensors")
    return out / "exported", [found for name, found in report.rows if name == "files"]


def with_own_code(source: Path) -> Path:
    """The situation of many published models: config.json names a class whose code lies beside it."""
    change_config(source, auto_map=OWN_CLASSES, architectures=["OwnForCausalLM"])
    (source / "configuration_own.py").write_text(CONFIGURATION)
    (source / "modeling_own.py").write_text(MODELING)
    return source


@pytest.mark.parametrize("trust", [False, True])
def test_a_model_with_its_own_code_is_exported_without_it(trust: bool, tmp_path: Path) -> None:
    source = with_own_code(make_model(tmp_path / "hf", "llama2"))
    exported, notes = round_trip(source, tmp_path)
    assert notes == ["config.json: auto_map is left out"]
    assert not list(exported.glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=trust, local_files_only=True)
    assert type(model).__name__ == "LlamaForCausalLM" == model.config.architectures[0]
    assert torch.equal(expected(exported), expected(source))


def test_code_that_is_left_behind_breaks_a_model_that_names_it(tmp_path: Path) -> None:
    """The situation that users reported. `convert verify` finds it in any directory."""
    source = with_own_code(make_model(tmp_path / "hf", "llama2"))
    import_model(source, tmp_path / "megatron", verification="none")
    assert not verify_models(source, tmp_path / "megatron", logits=False).failures
    (source / "modeling_own.py").unlink()
    with pytest.raises(OSError, match=r"modeling_own\.py"):
        AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, local_files_only=True)
    (failure,) = verify_models(source, tmp_path / "megatron", logits=False).failures
    assert failure.startswith(f"{source}: config.json: auto_map names modeling_own.py, which is not there")


@pytest.mark.parametrize("family", FAMILIES)
def test_both_writings_of_the_rotation_say_the_same(family: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", family)
    config = json.loads((source / "config.json").read_text())
    change_config(source, rope_parameters=config["rope_parameters"] | {"rope_theta": 1e5})
    exported, notes = round_trip(source, tmp_path)
    assert not notes
    fields = json.loads((exported / "config.json").read_text())
    assert fields["rope_theta"] == 1e5
    rotation = read_architecture(source).inv_freq
    for left_out in ({"rope_parameters"}, {"rope_theta", "rope_scaling"}):
        kept = {key: value for key, value in fields.items() if key not in left_out}
        (exported / "config.json").write_text(json.dumps(kept))
        found = read_architecture(exported)
        assert torch.equal(found.inv_freq, rotation) and found.rotary_scale == read_architecture(source).rotary_scale
        theirs = AutoConfig.from_pretrained(exported).rope_parameters
        assert theirs["rope_theta"] == 1e5 and theirs["rope_type"] == config["rope_parameters"]["rope_type"]


def test_a_config_of_transformers_4_gets_the_new_writing(tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", "llama2")
    fields = json.loads((source / "config.json").read_text())
    del fields["rope_parameters"], fields["dtype"]
    (source / "config.json").write_text(json.dumps(fields | {"rope_theta": 1e5, "torch_dtype": "float32"}))
    exported, notes = round_trip(source, tmp_path)
    found = json.loads((exported / "config.json").read_text())
    assert found["rope_parameters"] == {"rope_theta": 1e5, "rope_type": "default"} and found["rope_scaling"] is None
    assert found["dtype"] == found["torch_dtype"] == "float32" and not notes


@pytest.mark.parametrize("stated", [{"dtype": "bfloat16"}, {"dtype": None, "torch_dtype": "float16"}])
def test_the_precision_is_that_of_the_tensors(stated: dict[str, Any], tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", "llama2")
    change_config(source, **stated)
    exported, notes = round_trip(source, tmp_path)
    value = next(filter(None, stated.values()))
    assert notes == [f"config.json: dtype is float32, as the tensors are (it said {value})"]
    assert AutoModelForCausalLM.from_pretrained(exported).dtype is torch.float32


def test_most_numbers_decide_about_the_precision(tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", "llama2")
    change(
        source / WEIGHTS,
        lambda each: each.update({name: x.bfloat16() for name, x in each.items() if "norm" not in name}),
    )
    exported, _ = round_trip(source, tmp_path)
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"


def test_ties_are_stated(tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", "qwen2_tied")
    exported, _ = round_trip(source, tmp_path)
    assert json.loads((exported / "config.json").read_text())["tie_word_embeddings"] is True


LEFT_OVER: dict[str, Callable[[Path], object]] = {
    "adapter_config.json": lambda file: file.write_text('{"peft_type": "LORA", "base_model_name_or_path": "gone"}'),
    "trainer_state.json": lambda file: file.write_text("{}"),
    "params.json": lambda file: file.write_text("{}"),
    "modules.json": lambda file: file.write_text("[]"),
    "pytorch_model.bin.index.json": lambda file: file.write_text("{}"),
    "modeling_own.py": lambda file: file.write_text(""),
}


def test_what_describes_other_things_does_not_travel(tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", "llama2")
    for name, write in LEFT_OVER.items():
        write(source / name)
    exported, notes = round_trip(source, tmp_path)
    assert {file.name for file in exported.iterdir()} == {"config.json", "generation_config.json", WEIGHTS}
    assert not notes
    shutil.copy(source / "adapter_config.json", exported)
    (failure,) = verify_models(exported, tmp_path / "megatron", logits=False).failures
    assert "adapter_config.json describes an adapter, which is not there" in failure


def test_paths_of_another_machine_are_left_out(tmp_path: Path) -> None:
    source = make_tokenizer(make_model(tmp_path / "hf", "llama2"))
    change_config(source, _name_or_path="/home/someone/base")
    file = source / "tokenizer_config.json"
    own = {"name_or_path": "/home/someone/base", "tokenizer_file": "/home/someone/base/tokenizer.json"}
    code = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own | code))
    exported, notes = round_trip(source, tmp_path)
    assert notes == [f"tokenizer_config.json: {key} is left out" for key in ("auto_map", "tokenizer_file")]
    assert not any(b"someone" in each.read_bytes() for each in exported.iterdir())
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True, local_files_only=True)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()


def test_transformers_4_knows_the_names_in_the_tokenizers_settings(tmp_path: Path) -> None:
    """transformers 4.57 refuses the class TokenizersBackend, and a list of extra_special_tokens."""
    source = make_tokenizer(make_model(tmp_path / "hf", "llama2"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["w7"]})
    tokenizer.save_pretrained(source)
    before = json.loads((source / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend" and before["extra_special_tokens"] == ["w7"]
    exported, notes = round_trip(source, tmp_path)
    after = json.loads((exported / "tokenizer_config.json").read_text())
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast" and after["additional_special_tokens"] == ["w7"]
    assert "extra_special_tokens" not in after and not notes
    one, other = load_tokenizer(exported), load_tokenizer(source)
    assert one.fingerprint == other.fingerprint
    assert AutoTokenizer.from_pretrained(exported).all_special_tokens == tokenizer.all_special_tokens


@pytest.mark.parametrize("form", [("vocab.json", "merges.txt"), ("tokenizer.json",)])
def test_every_form_of_a_tokenizer_travels(form: tuple[str, ...], tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", "llama2")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate([*letters, "ab"])}, [("a", "b")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if "vocab.json" in form:
        tokenizer.model.save(str(source))
    else:
        tokenizer.save(str(source / "tokenizer.json"))
    name = "Qwen2Tokenizer" if "vocab.json" in form else "PreTrainedTokenizerFast"
    settings = {"tokenizer_class": name, "eos_token": "!", "unk_token": "!", "pad_token": "!"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    exported, _ = round_trip(source, tmp_path)
    assert all((exported / name).read_bytes() == (source / name).read_bytes() for name in form)
    for path in (tmp_path / "megatron", exported):
        assert has_tokenizer(path) and load_tokenizer(path).fingerprint == load_tokenizer(source).fingerprint
    assert load_tokenizer(exported).encode("ab", add_special_tokens=False) == [256]


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", "tokenizer.model.v3", "added_tokens.json"])
def test_other_files_of_a_tokenizer_travel(name: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", "llama2")
    (source / name).write_bytes(b"{}")
    exported, _ = round_trip(source, tmp_path)
    assert (exported / name).read_bytes() == b"{}"
    assert has_tokenizer(exported) is (name in ("tokenizer.model", "vocab.txt"))


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", "llama2")
    (source / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"huggingface/generation_config\.json: not valid JSON"):
        round_trip(source, tmp_path)

"""A Hugging Face directory as a model: what counts as a broken directory, and what does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM

from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.generate.model import Request
from megatron_solopo.generate.transformers import TransformersModel, load_transformers_model
from tests.prepared import make_tokenizer
from tests.tiny_models import make_model

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_model(path, "qwen3")
    return path


def cut_weights(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1000])


def remove_a_tensor(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def set_field(name: str, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(config | {name: value}))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        cut_weights,
        remove_a_tensor,
        lambda path: (path / WEIGHTS).unlink(),
        lambda path: (path / CONFIG).unlink(),
        lambda path: (path / CONFIG).write_text("{"),
        set_field("model_type", "made_up"),
        set_field("intermediate_size", 8),
        set_field("hidden_size", "wide"),
    ],
    ids=["cut", "tensor", "no weights", "no config", "no JSON", "type", "shape", "field"],
)
def test_a_broken_directory_is_one_line(model: Path, damage: Callable[[Path], None], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    damage(broken)
    with pytest.raises(UserError, match=r"--model .*broken: no loadable model: ") as error:
        load_transformers_model(broken)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", [KeyError("rope"), AttributeError("x"), RuntimeError("CUDA error: out of memory")])
def test_any_other_fault_keeps_its_type(model: Path, fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object, **named: object) -> None:
        raise fault

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(type(fault)) as error:
        load_transformers_model(model)
    assert error.value is fault and not isinstance(error.value, UserError)


def test_weights_that_are_not_finite_are_named(model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.inf
    save_file(tensors, broken / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"broken: .*model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        load_transformers_model(broken)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ("w3 w130 w140", 4, "the prompt of q has the token id 131, but the model has embeddings for ids up to 130"),
        ("w3 " * 500, 13, "the prompt of q and its answer take up to 513 tokens, but the model has 512 positions"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(
    model: Path, tmp_path: Path, prompt: str, max_tokens: int, words: str
) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    file = tokenizer / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["w140"] = 131  # one past the model's embedding
    file.write_text(json.dumps(content))
    loaded = TransformersModel(model, load_tokenizer(tokenizer), torch.device("cpu"))
    assert loaded.encode([Request("q", "w3 w130", (0,), 4)])[0][1] == [3, 130]
    with pytest.raises(UserError, match=words):
        loaded.encode([Request("q", prompt, (0,), max_tokens)])


def test_weights_have_the_dtype_that_is_asked_for(model: Path) -> None:
    for name in ("bfloat16", "float32"):
        loaded = load_transformers_model(model, name)
        assert {each.dtype for each in loaded.parameters()} == {getattr(torch, name)} and not loaded.training


PROMPTS_BT = torch.arange(3, 23).repeat(4, 1)
"""One prompt of 20 tokens, for four samples."""


def sampled_by_transformers(path: Path) -> torch.Tensor:
    """[4, 6], the tokens of four samples, each of which computed the whole prompt."""
    model = AutoModelForCausalLM.from_pretrained(path)
    sampling = {"do_sample": True, "temperature": 0.9, "top_k": 0, "max_new_tokens": 6}
    torch.manual_seed(0)
    whole_BT = model.generate(
        PROMPTS_BT, attention_mask=torch.ones_like(PROMPTS_BT), eos_token_id=None, pad_token_id=0, **sampling
    )
    return whole_BT[:, PROMPTS_BT.shape[1] :]


def count_computed(model: TransformersModel) -> list[int]:
    """How many tokens each pass of the model computes from now on."""
    computed: list[int] = []
    model._model.get_input_embeddings().register_forward_hook(lambda _, args, __: computed.append(args[0].numel()))
    return computed


def test_samples_of_one_request_are_those_of_transformers_and_compute_the_prompt_once(
    model: Path, tmp_path: Path
) -> None:
    loaded = TransformersModel(
        model, load_tokenizer(make_tokenizer(tmp_path)), torch.device("cpu"), "float32", temperature=0.9
    )
    plain_BT = sampled_by_transformers(model)
    computed = count_computed(loaded)
    torch.manual_seed(0)
    assert loaded.generate(PROMPTS_BT, 6, ()).tolist() == plain_BT.tolist()
    assert computed == [19, 4, 4, 4, 4, 4, 4]
    assert len({tuple(row) for row in plain_BT.tolist()}) > 1


def test_samples_of_a_model_with_other_states_than_keys_and_values_are_those_of_transformers(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 131}
    config = Lfm2Config(
        **shape, num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"], conv_L_cache=3
    )
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "model")
    loaded = TransformersModel(
        tmp_path / "model", load_tokenizer(make_tokenizer(tmp_path / "tokenizer")), torch.device("cpu"), "float32",
        temperature=0.9,
    )  # fmt: skip
    plain_BT = sampled_by_transformers(tmp_path / "model")
    computed = count_computed(loaded)
    torch.manual_seed(0)
    assert loaded.generate(PROMPTS_BT, 6, ()).tolist() == plain_BT.tolist()
    assert computed == [80, 4, 4, 4, 4, 4], "no pass over the prompt alone"

"""We read a config.json as transformers does, and refuse by name what we cannot reproduce."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_solopo.architecture.flops import linear_weights
from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.errors import UserError
from tests.tiny_models import FAMILIES, make_model

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "plans" / "models").iterdir())
# Fields as the models' authors published them, with some that transformers does not need.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 2, "torch_dtype": "bfloat16"},
    "qwen3": {"attention_bias": False, "rope_scaling": None, "rope_theta": 1000000, "max_window_layers": 4},
    "mistral": {"sliding_window": None, "rope_theta": 1e6, "head_dim": None},
    "llama3": {"rope_theta": 5e5, "pretraining_tp": 1, "mlp_bias": False},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}

REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "llama2",
        {"model_type": "gpt2"},
        ["model_type='gpt2'", "llama, mistral, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe"],
    ),
    (
        "llama2",
        {"model_type": "no_such_model"},
        ["model_type='no_such_model'", "llama, mistral, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe"],
    ),
    (
        "llama2",
        {"model_type": None},
        ["model_type=None", "llama, mistral, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe"],
    ),
    (
        "llama2",
        {"model_type": ["llama"]},
        ["model_type=['llama']", "llama, mistral, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe"],
    ),
    (
        "llama2",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        ["rope_type='dynamic'", "default, linear, llama3, yarn"],
    ),
    ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type='dynamic'", "default, linear"]),
    (
        "llama2",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 2.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            }
        },
        ["rope_type='longrope'", "default, linear, llama3, yarn"],
    ),
    ("llama2", {"rope_parameters": LLAMA3}, ["llama3", "low_freq_factor", "high_freq_factor"]),
    ("llama2", {"rope_parameters": "yarn"}, ["rope_parameters", "yarn"]),
    ("olmoe", {"clip_qkv": 8.0}, ["clip_qkv=8.0", "supported: null"]),
    ("olmoe", {"head_dim": 16}, ["num_attention_heads=4 x head_dim=16", "hidden_size=32"]),
    ("mistral", {"sliding_window": 128}, ["sliding_window=128", "supported: null"]),
    ("qwen2", {"sliding_window": 128, "use_sliding_window": True}, ["sliding_window=128", "supported: null"]),
    (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        ["layer_types.1='sliding_attention'", "supported: full_attention"],
    ),
    ("llama2", {"hidden_act": "gelu"}, ["hidden_act='gelu'", "supported: silu"]),
    ("llama2", {"attention_bias": True}, ["attention_bias=True", "supported: False"]),
    ("qwen3", {"attention_bias": True}, ["attention_bias=True", "supported: False"]),
    ("llama2", {"mlp_bias": True}, ["mlp_bias=True", "supported: False"]),
    (
        "llama2",
        {
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 1e4,
                "factor": 2.0,
                "partial_rotary_factor": 0.5,
            }
        },
        ["partial_rotary_factor=0.5", "supported: 1.0"],
    ),
    (
        "llama2",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        ["quantization_config with quant_method='gptq'", "supported: none"],
    ),
    ("llama2", {"compression_config": {"quant_method": "compressed-tensors"}}, ["quant_method='compressed-tensors'"]),
    ("llama2", {"hidden_size": "wide"}, ["hidden_size", "wide"]),
    ("llama2", {"rms_norm_eps": None}, ["rms_norm_eps"]),
    ("mistral", {"num_key_value_heads": None}, ["num_key_value_heads"]),
    ("qwen3", {"head_dim": 7}, ["head_dim=7", "even"]),
    ("qwen3", {"layer_types": ["full_attention"] * 3}, ["layer_types names 3 layers", "num_hidden_layers=4"]),
    ("llama2", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", "supported: 1.0"]),
    ("qwen2", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, ["full_attention", "not supported"]),
    ("llama2", {"num_attention_heads": 3}, ["num_attention_heads=3", "must divide hidden_size=32"]),
    ("llama2", {"num_attention_heads": 0}, ["num_attention_heads=0", "greater than or equal to 1"]),
    ("llama3", {"num_key_value_heads": 3}, ["num_key_value_heads=3", "num_attention_heads=4"]),
    ("llama3", {"num_hidden_layers": 0}, ["num_hidden_layers=0", "greater than or equal to 1"]),
    ("llama3", {"vocab_size": -1}, ["vocab_size=-1", "greater than or equal to 1"]),
]


def write(folder: Path, family: str, changes: dict[str, Any]) -> Path:
    """A config.json of `family` with some fields changed. An old name of a field replaces the new one."""
    FAMILIES[family].save_pretrained(folder)
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    if "rope_parameters" not in changes and changes.keys() & {"rope_theta", "rope_scaling"}:
        del fields["rope_parameters"]
    if "torch_dtype" in changes:
        fields.pop("dtype", None)
    file.write_text(json.dumps(fields | changes))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_architecture(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / 'config.json'}: ") and "\n" not in message and len(message) < 600
    return message.removeprefix(f"{folder / 'config.json'}: ")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotation_is_the_models_own(family: str, tmp_path: Path) -> None:
    found = read_architecture(write(tmp_path, family, {}))
    rotary = AutoModelForCausalLM.from_config(FAMILIES[family]).model.rotary_emb
    assert torch.equal(found.inv_freq, rotary.inv_freq) and found.inv_freq.dtype is torch.float32
    assert found.rotary_scale == rotary.attention_scaling
    assert (found.rotary_scale != 1.0) is (family == "qwen2_yarn")
    assert found.softmax_scale == pytest.approx(rotary.attention_scaling**2 / found.head_dim**0.5)


def check_feed_forwards(found: Architecture, model: Any) -> None:
    """Every layer is dense or has experts, as the model has built it. Its experts are those that were read."""
    for number, layer in enumerate(model.model.layers):
        assert found.has_experts(number) is hasattr(layer.mlp, "experts")
        if not found.has_experts(number):
            assert layer.mlp.gate_proj.weight.shape == (found.ffn_hidden_size, found.hidden_size)
            continue
        experts = found.experts
        assert experts is not None
        weights = layer.mlp.experts.down_proj
        assert weights.shape == (experts.num_experts, found.hidden_size, experts.ffn_hidden_size)
        assert layer.mlp.gate.top_k == experts.topk
        # Mixtral always renormalizes, and has no switch for it.
        assert getattr(layer.mlp.gate, "norm_topk_prob", True) is experts.renormalizes
        shared = layer.mlp.shared_expert.up_proj.weight if hasattr(layer.mlp, "shared_expert") else ()
        assert len(shared) == experts.shared_ffn_hidden_size


def idle_parameters(model: Any) -> int:
    """Parameters of the experts that a token is not sent to. transformers holds a layer's experts in two tensors."""
    return sum(
        tensor.numel() // len(tensor) * (len(tensor) - layer.mlp.gate.top_k)
        for layer in model.model.layers
        if hasattr(layer.mlp, "experts")
        for tensor in layer.mlp.experts.parameters()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sizes_are_those_of_the_models_weights(family: str, tmp_path: Path) -> None:
    found = read_architecture(write(tmp_path, family, {}))
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    layer = model.model.layers[0]
    queries, keys = found.num_attention_heads * found.head_dim, found.num_query_groups * found.head_dim
    assert layer.self_attn.q_proj.weight.shape == (queries, found.hidden_size)
    assert layer.self_attn.k_proj.weight.shape == (keys, found.hidden_size)
    check_feed_forwards(found, model)
    assert found.num_parameters == sum(each.numel() for each in model.parameters())
    idle = idle_parameters(model)
    assert found.num_active_parameters == found.num_parameters - idle
    matrices = sum(each.numel() for each in model.model.layers.parameters() if each.dim() > 1)
    assert linear_weights(found) == matrices - idle
    assert len(model.model.embed_tokens.weight) == found.vocab_size
    assert len(model.model.layers) == found.num_layers
    assert layer.input_layernorm.variance_epsilon == found.layernorm_epsilon
    assert (layer.self_attn.q_proj.bias is not None) is found.add_qkv_bias
    assert hasattr(layer.self_attn, "q_norm") is (found.qk_layernorm or found.norms_all_heads)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is found.tied_embeddings


@pytest.mark.parametrize(
    ("family", "stated", "expected"),
    [
        ("llama2", 512, 512),
        ("llama3", 512, 512),
        ("llama_linear", 512, 512),
        # YaRN scales 64 positions to 256, whichever of the two the config states.
        ("qwen2_yarn", 64, 256),
        ("qwen2_yarn", 256, 256),
        ("qwen2_yarn", 300, 300),
    ],
)
def test_the_longest_sequence_includes_yarns_scaling(family, stated, expected, tmp_path) -> None:
    changes = {"max_position_embeddings": stated}
    assert read_architecture(write(tmp_path, family, changes)).max_sequence_length == expected


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    REFUSED,
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_reproduced_is_refused_by_name(family, changes, words, tmp_path) -> None:
    message = refusal(write(tmp_path, family, changes))
    assert all(word in message for word in words), message


def test_a_sliding_window_that_is_off_is_accepted(tmp_path: Path) -> None:
    changes = {"sliding_window": 128, "use_sliding_window": False}
    assert read_architecture(write(tmp_path, "qwen2", changes)).model_type == "qwen2"


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(
        "no such file; a model is a Hugging Face directory on disk"
    ) and "model.path" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    [b"{ nope", b"", b"\xff\xfe\x00\x81", b'{"model_type": "llama"', b'{"rope_theta": 1e4, "rope_theta": 1e6}'],
)
def test_broken_json_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    assert refusal(tmp_path).startswith("not valid JSON: ")


@pytest.mark.parametrize("text", ["[1]", "null", '"llama"', "{}"])
def test_json_that_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert refusal(tmp_path).startswith("model_type=None is not supported; supported: ")


def test_a_models_own_code_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: ...\n")
    message = refusal(write(tmp_path, "llama2", {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}))
    assert "model_type='own'" in message and not marker.exists()


def without(folder: Path, *names: str) -> Path:
    """Remove fields from a config.json."""
    file = folder / "config.json"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in stated.items() if name not in names}))
    return folder


def test_a_window_that_is_on_unless_stated_is_refused(tmp_path: Path) -> None:
    assert "sliding_window=4096 is not supported" in refusal(without(write(tmp_path, "mistral", {}), "sliding_window"))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_as_transformers_counts_them(family: str, tmp_path: Path) -> None:
    make_model(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read_architecture(tmp_path).num_parameters == model.num_parameters()


def assert_reads_as_transformers(folder: Path) -> None:
    found, theirs = read_architecture(folder), AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        rotary = AutoModelForCausalLM.from_config(theirs).model.rotary_emb
    assert found.model_type == theirs.model_type
    assert found.num_layers == theirs.num_hidden_layers
    assert found.hidden_size == theirs.hidden_size
    assert found.ffn_hidden_size == theirs.intermediate_size
    assert found.num_attention_heads == theirs.num_attention_heads
    assert found.num_query_groups == theirs.num_key_value_heads
    assert found.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert found.vocab_size == theirs.vocab_size
    assert found.max_sequence_length == theirs.max_position_embeddings
    assert found.layernorm_epsilon == theirs.rms_norm_eps
    assert found.tied_embeddings is theirs.tie_word_embeddings
    frequencies = type(rotary)(theirs).inv_freq
    assert torch.equal(found.inv_freq, frequencies) and found.rotary_scale == rotary.attention_scaling


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape must be read without transformers, whose import takes seconds."""

    def asked(*arguments: Any, **fields: Any) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(AutoConfig, "for_model", asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tiny_model_is_read_as_transformers_reads_it(family: str, tmp_path: Path) -> None:
    assert_reads_as_transformers(write(tmp_path, family, {}))


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_every_example_is_read_as_transformers_reads_it(folder: Path) -> None:
    assert_reads_as_transformers(folder)


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_fields_are_read_as_transformers_reads_them(family: str, tmp_path: Path) -> None:
    assert_reads_as_transformers(write(tmp_path, family, PUBLISHED[family]))


@pytest.mark.usefixtures("no_transformers")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_complete_config_needs_no_transformers(family: str, tmp_path: Path) -> None:
    assert read_architecture(write(tmp_path, family, PUBLISHED.get(family, {}))).num_layers == 4


@pytest.mark.usefixtures("no_transformers")
@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_an_example_needs_no_transformers(folder: Path) -> None:
    assert read_architecture(folder).num_layers >= 28


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("llama2", "num_key_value_heads"),
        ("llama2", "tie_word_embeddings"),
        ("llama2", "hidden_act"),
        ("llama2", "rope_parameters"),
        ("llama2", "head_dim"),
        ("llama3", "max_position_embeddings"),
        ("qwen3", "head_dim"),
    ],
)
def test_a_missing_field_has_the_default_of_transformers(family: str, missing: str, tmp_path: Path) -> None:
    assert_reads_as_transformers(without(write(tmp_path, family, {}), missing))


@pytest.mark.parametrize("original", [{}, {"original_max_position_embeddings": 64}])
def test_yarn_without_its_original_length_starts_from_the_stated_one(original: dict, tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "finetuned": True} | original
    folder = without(write(tmp_path, "qwen2", {"rope_scaling": scaling, "rope_theta": 1e6}), "rope_parameters")
    found, theirs = read_architecture(folder), AutoConfig.from_pretrained(folder)
    assert found.max_sequence_length == (512 if original else 2048)
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    assert torch.equal(found.inv_freq, frequencies) and found.rotary_scale == scale


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "linear"}, "rope_type=linear needs factor"),
        ({"rope_type": "yarn", "factor": "4"}, "rope_scaling.factor='4'"),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}, "rope_scaling.rope_theta=1.0"),
    ],
)
def test_bad_scaling_is_refused_when_it_is_read(scaling: dict, words: str, tmp_path: Path) -> None:
    assert words in refusal(write(tmp_path, "llama2", {"rope_scaling": scaling}))

"""A model's sizes: all that a plan needs to know of it.

What a Hugging Face `config.json` says about a model, in the terms Megatron-Core needs.

Everything is derived from the config, scaled rotary frequencies by transformers' own code. What we
cannot reproduce exactly is refused by name rather than approximated.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_solopo.architecture.model_directory import huggingface_directory
from megatron_solopo.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder-only transformer: RMSNorm, SwiGLU, rotary embedding, grouped-query attention."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_sequence_length: int
    """Positions that the model was made for, rope scaling included."""
    add_qkv_bias: bool
    qk_layernorm: bool
    tied_embeddings: bool

    @property
    def num_parameters(self) -> int:
        """Of the whole model, tied embeddings counted once."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        attention = 2 * self.hidden_size * (queries + keys) + (queries + 2 * keys if self.add_qkv_bias else 0)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_layernorm else 0)
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + norms
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Architecture(ModelShape):
    """A model's shape, and the numbers that its layers compute with."""

    layernorm_epsilon: float
    inv_freq: Tensor
    """Rotary frequencies, fp32 [head_dim / 2]."""
    rotary_scale: float
    """Factor on cos and sin (YaRN's attention factor); attention logits grow by its square."""

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention logits: rotary_scale^2 / sqrt(head_dim)."""
        return float(self.rotary_scale**2 / self.head_dim**0.5)


def read_architecture(path: Path) -> Architecture:
    """Read `config.json` of a Hugging Face directory, or of the one inside a Megatron checkpoint.

    Raises UserError naming the file, the offending field and the supported values.
    """
    path = huggingface_directory(path)
    file = path / "config.json"
    _check_model_type(file)
    with _named_errors(file):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    _refuse_unsupported(config, file)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with _named_errors(file):
        inv_freq, rotary_scale = _rotary(config, head_dim)
    if 2 * len(inv_freq) != head_dim:
        raise UserError(
            f"{file}: {len(inv_freq)} rotary frequencies do not rotate head_dim={head_dim} whole; "
            "supported: partial_rotary_factor 1.0"
        )
    return Architecture(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_sequence_length=_max_sequence_length(config),
        layernorm_epsilon=config.rms_norm_eps,
        add_qkv_bias=config.model_type == "qwen2",
        qk_layernorm=config.model_type == "qwen3",
        tied_embeddings=config.tie_word_embeddings,
        inv_freq=inv_freq.float(),
        rotary_scale=rotary_scale,
    )


def _check_model_type(file: Path) -> None:
    """Refuse what is no config of a supported model, before transformers looks for the code of an unknown one."""
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; a model is a Hugging Face directory, or a Megatron checkpoint with a "
            "folder huggingface/; set model.path to one"
        )
    try:
        fields = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    fields = fields if isinstance(fields, dict) else {}
    model_type = fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"{file}: model_type={model_type!r} is not supported; supported: {_listed(MODEL_TYPES)}")
    if (quantization := fields.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(
            f"{file}: quantization_config with quant_method={method!r} is not supported; supported: none "
            "(take the unquantized model, or save it dequantized and without that field)"
        )


@contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Turn whatever transformers raises for a bad field (its checks share no base class) into one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{file}: transformers cannot read it: {' '.join(str(error).split())[:300]}") from None


def _rotary(config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Frequencies and the factor on cos and sin.

    transformers keeps those of no scaling with each model, whose modules take 1.5 s to import; of them there is only
    one kind (`LlamaRotaryEmbedding.compute_default_rope_parameters`).
    """
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim), 1.0
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)


def _max_sequence_length(config: Any) -> int:
    """YaRN configs may state the length before scaling; the others state it after."""
    rope = config.rope_parameters
    original = rope.get("original_max_position_embeddings")
    scaled = int(original * rope["factor"]) if rope["rope_type"] == "yarn" and original else 0
    return max(int(config.max_position_embeddings), scaled)


def _refuse_unsupported(config: Any, file: Path) -> None:
    rope_type = config.rope_parameters.get("rope_type")
    if rope_type not in ROPE_TYPES:
        raise UserError(f"{file}: rope_type={rope_type!r} is not supported; supported: {_listed(ROPE_TYPES)}")
    required = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
    for field, value in required.items():
        found = getattr(config, field, value)
        if found is not None and found != value:
            raise UserError(f"{file}: {field}={found!r} is not supported; supported: {value!r}")
    if getattr(config, "sliding_window", None) is not None:
        raise UserError(
            f"{file}: sliding_window={config.sliding_window} is not supported; supported: null "
            "(long-context alignment needs full attention)"
        )
    other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if other_layers:
        raise UserError(
            f"{file}: layer_types={_listed(sorted(other_layers))} is not supported; supported: full_attention"
        )
    _refuse_impossible(config, file)


def _refuse_impossible(config: Any, file: Path) -> None:
    for field in _COUNTS:
        count = getattr(config, field)
        if count is not None and count < 1:
            raise UserError(f"{file}: {field}={count} must be at least 1")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if groups and heads % groups:
        raise UserError(f"{file}: num_key_value_heads={groups} must divide num_attention_heads={heads}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)

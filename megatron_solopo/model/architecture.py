"""What a Hugging Face `config.json` says about a model, in the terms Megatron-Core needs.

Everything is derived from the config, rotary frequencies by transformers' own code. What we
cannot reproduce exactly is refused by name rather than approximated.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Architecture:
    """A dense decoder-only transformer: RMSNorm, SwiGLU, rotary embedding, grouped-query attention."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    add_qkv_bias: bool
    qk_layernorm: bool
    tied_embeddings: bool
    inv_freq: Tensor
    """Rotary frequencies, fp32 [head_dim / 2]."""
    rotary_scale: float
    """Factor on cos and sin (YaRN's attention factor); attention logits grow by its square."""

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention logits: rotary_scale^2 / sqrt(head_dim)."""
        return self.rotary_scale**2 / self.head_dim**0.5


def read_architecture(path: Path) -> Architecture:
    """Read `config.json` of a Hugging Face directory.

    Raises ValueError naming the file, the offending field and the supported values.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; model.path must be a Hugging Face model directory")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{file}: transformers cannot read it: {' '.join(str(error).split())[:300]}") from None
    _refuse_unsupported(config, file)
    rotary = LlamaRotaryEmbedding(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Architecture(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        layernorm_epsilon=config.rms_norm_eps,
        add_qkv_bias=config.model_type == "qwen2",
        qk_layernorm=config.model_type == "qwen3",
        tied_embeddings=config.tie_word_embeddings,
        inv_freq=rotary.inv_freq.float(),
        rotary_scale=rotary.attention_scaling,
    )


def _refuse_unsupported(config: Any, file: Path) -> None:
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"{file}: model_type={config.model_type!r} is not supported; supported: {_listed(MODEL_TYPES)}"
        )
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"{file}: rope_type={rope_type!r} is not supported; supported: {_listed(ROPE_TYPES)}")
    required = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
    for field, value in required.items():
        found = getattr(config, field, value)
        if found is not None and found != value:
            raise ValueError(f"{file}: {field}={found!r} is not supported; supported: {value!r}")
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"{file}: sliding_window={config.sliding_window} is not supported; supported: null "
            "(long-context alignment needs full attention)"
        )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)

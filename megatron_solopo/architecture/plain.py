"""Reads a model's sizes without torch or transformers, which take seconds to import.

A `config.json` that states every size plainly, as those of published models do, is read here. Of anything else
transformers is the judge.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError, model_validator

from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.model_directory import CONFIG, huggingface_directory
from megatron_solopo.errors import UserError


def read_shape(path: Path) -> ModelShape:
    """The shape of the model in a Hugging Face directory, or of the one inside a Megatron checkpoint.

    Raises UserError naming the file, the offending field and the supported values.
    """
    try:
        plain = _Plain.model_validate_json((huggingface_directory(path) / CONFIG).read_bytes())
    except (OSError, ValidationError):
        from megatron_solopo.architecture.huggingface_config import read_architecture

        return read_architecture(path)
    return plain.shape


class _Rope(BaseModel):
    """Rotation without scaling, or Llama 3's, whose length the config states after scaling."""

    model_config = ConfigDict(strict=True, extra="forbid")

    rope_type: Literal["default", "llama3"]
    rope_theta: PositiveFloat = 1.0
    factor: PositiveFloat | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        own = (self.factor, self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings)
        _require(all(own) if self.rope_type == "llama3" else not any(own))
        return self


class _Plain(BaseModel):
    """A config.json in which nothing is left to a default that matters here, and nothing is out of the ordinary."""

    model_config = ConfigDict(strict=True)

    model_type: Literal["llama", "mistral", "qwen2", "qwen3"]
    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveFloat
    tie_word_embeddings: bool
    hidden_act: Literal["silu"]
    head_dim: PositiveInt | None = None
    rope_theta: PositiveFloat = 1.0
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    partial_rotary_factor: None = None
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    layer_types: list[Literal["full_attention"]] | None = None
    use_sliding_window: bool = False
    sliding_window: Any = None
    quantization_config: None = None

    @model_validator(mode="after")
    def _is_plain(self) -> Self:
        _require(self.hidden_size % self.num_attention_heads == 0)
        _require(self.num_attention_heads % self.num_key_value_heads == 0)
        _require(self.shape.head_dim % 2 == 0)
        _require(self.layer_types is None or len(self.layer_types) == self.num_hidden_layers)
        _require(not self.use_sliding_window)
        if self.model_type == "qwen3":  # its heads have a width of their own where none is stated
            _require(self.head_dim is not None)
        if self.model_type == "mistral":  # its window is on where none is stated
            _require("sliding_window" in self.model_fields_set)
        if self.model_type in ("llama", "mistral"):
            _require(self.sliding_window is None)
        return self

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            model_type=self.model_type,
            num_layers=self.num_hidden_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_key_value_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            vocab_size=self.vocab_size,
            max_sequence_length=self.max_position_embeddings,
            add_qkv_bias=self.model_type == "qwen2",
            qk_layernorm=self.model_type == "qwen3",
            tied_embeddings=self.tie_word_embeddings,
        )


def _require(holds: bool) -> None:
    """The message is never shown: what is not plain is read by transformers."""
    if not holds:
        raise UserError("not plain")

"""Reads a Hugging Face `config.json` and states the model in Megatron-Core's terms.

Importing this module imports neither torch nor transformers, so a plan answers quickly. transformers is asked

- for its defaults, where a config leaves out a field that matters here;
- for the rotary frequencies, when they are first used.

A config that we cannot reproduce exactly is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megatron_solopo.architecture.contradictions import CLASSES, contradictions
from megatron_solopo.architecture.experts import ExpertShape
from megatron_solopo.architecture.model_directory import CONFIG, check_one_kind, huggingface_directory, parse_model_json
from megatron_solopo.errors import UserError, describe_problem

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPES = tuple(CLASSES)


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer: RMSNorm, SwiGLU, rotary embedding, grouped-query attention, perhaps experts."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Feed-forward columns of a dense layer."""
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_sequence_length: int
    """Positions that the model was made for, rope scaling included."""
    add_qkv_bias: bool
    qk_layernorm: bool
    tied_embeddings: bool
    experts: ExpertShape | None = field(default=None, kw_only=True)
    """None: all layers are dense."""
    norms_all_heads: bool = field(default=False, kw_only=True)
    """Whether one norm takes the queries of all heads at once, and one the keys."""

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return self.experts is not None and self.experts.layers[layer]

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of its matrices by name, as the mapping table and the adapters use them."""
        found = {
            "one": 1,
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "head": self.head_dim,
            "queries": self.num_attention_heads * self.head_dim,
            "keys": self.num_query_groups * self.head_dim,
        }
        if self.experts is not None:
            found |= {
                "experts": self.experts.num_experts,
                "expert_ffn": self.experts.ffn_hidden_size,
                "shared_ffn": self.experts.shared_ffn_hidden_size,
            }
        return found

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model. Tied embeddings count once."""
        return self._num_parameters(None if self.experts is None else self.experts.num_experts)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that compute a token: of the experts, those of the `topk` that the router chooses."""
        return self._num_parameters(None if self.experts is None else self.experts.topk)

    @property
    def num_router_parameters(self) -> int:
        """Parameters of the routers, which only `moe.router_trainable` trains."""
        return 0 if self.experts is None else self.experts.num_layers * self.experts.num_experts * self.hidden_size

    def _num_parameters(self, experts_per_layer: int | None) -> int:
        queries, keys = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        attention = 2 * self.hidden_size * (queries + keys) + (queries + 2 * keys if self.add_qkv_bias else 0)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_layernorm else 0)
        norms += queries + keys if self.norms_all_heads else 0
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        dense_layers, feed_forward = self.num_layers, 0
        if self.experts is not None and experts_per_layer is not None:
            shared = self.experts.shared_ffn_hidden_size
            columns = experts_per_layer * self.experts.ffn_hidden_size + shared
            router = self.experts.num_experts * self.hidden_size + (self.hidden_size if shared else 0)
            feed_forward = self.experts.num_layers * (3 * self.hidden_size * columns + router)
            dense_layers -= self.experts.num_layers
        feed_forward += dense_layers * 3 * self.hidden_size * self.ffn_hidden_size
        return self.num_layers * (attention + norms) + feed_forward + embeddings + self.hidden_size


@dataclass(frozen=True)
class Architecture(ModelShape):
    """A model's shape, and the numbers that its layers compute with."""

    layernorm_epsilon: float
    rotary_fields: Mapping[str, Any] = field(hash=False)
    """The fields of config.json that decide the rotation, as transformers takes them."""

    @property
    def inv_freq(self) -> Tensor:
        """Rotary frequencies, fp32 [head_dim / 2]."""
        return self._rotation[0]

    @property
    def rotary_scale(self) -> float:
        """Factor on cos and sin (YaRN's attention factor). Attention logits grow by its square."""
        return self._rotation[1]

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention logits: rotary_scale^2 / sqrt(head_dim)."""
        return float(self.rotary_scale**2 / self.head_dim**0.5)

    @cached_property
    def _config(self) -> Any:
        """transformers' config of the rotation."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.model_type,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            head_dim=self.head_dim,
            **copy.deepcopy(dict(self.rotary_fields)),  # transformers changes what it is given
        )

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """The rotation as transformers 5 states it: `rope_type`, `rope_theta` and the numbers of that type."""
        return dict(self._config.rope_parameters)

    @cached_property
    def _rotation(self) -> tuple[Tensor, float]:
        """Frequencies and the factor on cos and sin, by transformers' own code.

        Without scaling the formula stands here. transformers keeps it in each model's module, and that takes 1.5 s to
        import (`LlamaRotaryEmbedding.compute_default_rope_parameters`).
        """
        import torch
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope = self.rope_parameters
        if rope["rope_type"] == "default":
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float) / self.head_dim
            return 1.0 / rope["rope_theta"] ** exponents, 1.0
        inv_freq, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](self._config)
        assert 2 * len(inv_freq) == self.head_dim, f"{len(inv_freq)} frequencies for head_dim={self.head_dim}"
        return inv_freq.float(), scale


def read_architecture(path: Path, key: str = "model.path") -> Architecture:
    """Read `config.json` of a Hugging Face directory, or of the one inside a Megatron checkpoint.

    Args:
        key: what names the path, for the error of a missing file.

    Raises UserError naming the file, the offending field and the supported values.
    """
    check_one_kind(path)
    file = huggingface_directory(path) / CONFIG
    stated = fields = _read_fields(file, key)
    config, problems = _validate(fields)
    if problems and all(_is_left_open(problem) for problem in problems):
        fields = _with_defaults(file, fields)
        config, problems = _validate(fields)
    if config is None:
        raise UserError(f"{file}: {'; '.join(map(_described, problems))}")
    if problem := next(contradictions(stated), None):
        raise UserError(f"{file}: {problem}")
    return Architecture(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        head_dim=config.width_of_heads,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_sequence_length,
        layernorm_epsilon=config.rms_norm_eps,
        add_qkv_bias=config.model_type in ("qwen2", "qwen2_moe") and config.qkv_bias is not False,
        qk_layernorm=config.model_type in ("qwen3", "qwen3_moe"),
        tied_embeddings=config.tie_word_embeddings,
        experts=config.experts,
        norms_all_heads=config.model_type == "olmoe",
        rotary_fields={name: fields[name] for name in _ROTARY_FIELDS if fields.get(name) is not None},
    )


def _read_fields(file: Path, key: str) -> dict[str, Any]:
    """The fields as stated. Refuses a file that is no config of a supported, unquantized model."""
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; a model is a Hugging Face directory on disk, or a Megatron checkpoint with a "
            f"folder huggingface/; set {key} to one (`hf download NAME --local-dir DIR` fetches one)"
        )
    fields = parse_model_json(file.read_bytes(), file)
    if not isinstance(fields, dict):
        fields = {}
    model_type = fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"{file}: model_type={model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    # Compressed models state it under the second name.
    if (quantization := fields.get("quantization_config", fields.get("compression_config"))) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(
            f"{file}: quantization_config with quant_method={method!r} is not supported; supported: none "
            "(take the unquantized model, or save it dequantized and without that field)"
        )
    if (quantized := file.parent / "hf_quant_config.json").is_file():
        raise UserError(
            f"{quantized}: vLLM takes the weights for quantized, transformers does not; take the unquantized model, or "
            "remove that file"
        )
    return fields


def _with_defaults(file: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that matter here, completed and normalised by transformers."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    stated = {name: copy.deepcopy(fields[name]) for name in _Config.model_fields if name in fields}
    try:
        config = AutoConfig.for_model(**stated)
    except StrictDataclassError as error:
        raise UserError(f"{file}: transformers cannot read it: {' '.join(str(error).split())[:300]}") from None
    return {name: getattr(config, name) for name in _Config.model_fields if hasattr(config, name)}


# What a config must say of the experts, by model_type. What it leaves out has a default in transformers.
_EXPERT_FIELDS = {
    "mixtral": ("num_local_experts", "num_experts_per_tok"),
    "olmoe": ("num_experts", "num_experts_per_tok", "norm_topk_prob"),
    "qwen2_moe": (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
    ),
    "qwen3_moe": (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
    ),
}
_ROTARY_FIELDS = ("max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters")
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_LEFT_TO_DEFAULT = "left_to_default"


def _refuse_null(value: float | None, info: ValidationInfo) -> float | None:
    """For a field that may be left out, but not be null."""
    if value is None:
        raise UserError(f"{info.field_name}=null is not supported; leave the field out")
    return value


def _check_whole(factor: float | None) -> float | None:
    if factor not in (None, 1.0):
        raise UserError(f"partial_rotary_factor={factor} is not supported; supported: 1.0")
    return factor


_Count = Annotated[int, Field(ge=1)]
_Theta = Annotated[Annotated[float, Field(gt=1)] | None, AfterValidator(_refuse_null)]
_WholeRotation = Annotated[float | None, AfterValidator(_check_whole)]


class _Rope(BaseModel):
    """Parameters of one rotation. transformers ignores keys that it does not know, and so do we."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    rope_type: Literal["default", "linear", "llama3", "yarn"]
    rope_theta: _Theta = None
    factor: PositiveFloat | None = None
    original_max_position_embeddings: Annotated[_Count | None, AfterValidator(_refuse_null)] = None
    partial_rotary_factor: _WholeRotation = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_type(cls, fields: Any) -> Any:
        """Old configs name the type `type`, or leave it out."""
        if not isinstance(fields, dict):
            return fields
        return fields | {"rope_type": fields.get("rope_type", fields.get("type", "default"))}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if missing := [name for name in _ROPE_NEEDS[self.rope_type] if getattr(self, name) is None]:
            raise UserError(f"rope_type={self.rope_type} needs {', '.join(missing)}")
        if nested := [name for name, value in (self.model_extra or {}).items() if isinstance(value, dict)]:
            raise UserError(f"rope parameters for each kind of layer ({', '.join(nested)}) are not supported")
        return self


class _Config(BaseModel):
    """The fields of config.json that matter here. A required field has a default in transformers."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model_type: str
    num_hidden_layers: _Count
    hidden_size: _Count
    intermediate_size: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count
    vocab_size: _Count
    max_position_embeddings: _Count
    rms_norm_eps: PositiveFloat
    tie_word_embeddings: bool
    hidden_act: Literal["silu"]
    head_dim: _Count | None = None
    rope_theta: _Theta = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    partial_rotary_factor: _WholeRotation = None
    original_max_position_embeddings: int | None = None
    attention_bias: Literal[False] | None = None
    mlp_bias: Literal[False] | None = None
    layer_types: list[Literal["full_attention"]] | None = None
    use_sliding_window: bool | None = None
    sliding_window: int | None = None
    qkv_bias: bool | None = None
    clip_qkv: float | None = None
    num_experts: _Count | None = None
    num_local_experts: _Count | None = None
    num_experts_per_tok: _Count | None = None
    moe_intermediate_size: _Count | None = None
    shared_expert_intermediate_size: _Count | None = None
    norm_topk_prob: bool | None = None
    decoder_sparse_step: _Count | None = None
    mlp_only_layers: list[Annotated[int, Field(ge=0)]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_rope(cls, fields: dict[str, Any]) -> dict[str, Any]:
        empty = [name for name in ("rope_scaling", "rope_parameters") if fields.get(name) == {}]
        return {name: value for name, value in fields.items() if name not in empty}

    @model_validator(mode="before")
    @classmethod
    def _name_experts(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Old and new versions of transformers name the number of experts differently."""
        stated = [fields[name] for name in ("num_experts", "num_local_experts") if fields.get(name) is not None]
        count = stated[0] if stated else None
        return fields if count is None else fields | {"num_experts": count, "num_local_experts": count}

    @property
    def experts(self) -> ExpertShape | None:
        """None for the families without experts."""
        if self.model_type not in _EXPERT_FIELDS:
            return None
        assert self.num_experts is not None and self.num_experts_per_tok is not None
        step, dense = self.decoder_sparse_step or 1, self.mlp_only_layers or []
        return ExpertShape(
            num_experts=self.num_experts,
            topk=self.num_experts_per_tok,
            ffn_hidden_size=self.moe_intermediate_size or self.intermediate_size,
            renormalizes=self.norm_topk_prob is not False,
            layers=tuple((layer + 1) % step == 0 and layer not in dense for layer in range(self.num_hidden_layers)),
            shared_ffn_hidden_size=self.shared_expert_intermediate_size or 0,
        )

    @property
    def rope(self) -> _Rope:
        """Where both are stated, they say the same."""
        return self.rope_scaling or self.rope_parameters or _Rope(rope_type="default")

    @property
    def width_of_heads(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def max_sequence_length(self) -> int:
        """YaRN configs may state the length before scaling; the others state it after."""
        if self.rope.rope_type != "yarn":
            return self.max_position_embeddings
        assert self.rope.factor is not None and self.rope.original_max_position_embeddings is not None
        return max(self.max_position_embeddings, int(self.rope.original_max_position_embeddings * self.rope.factor))

    @model_validator(mode="after")
    def _check_defaults(self) -> Self:
        """Find what has a default that differs between families, or is derived from other fields."""
        uses_window = self.model_type in ("mistral", "mixtral") or self.use_sliding_window
        for name, is_open in (
            *((name, getattr(self, name) is None) for name in _EXPERT_FIELDS.get(self.model_type, ())),
            ("head_dim", self.model_type == "qwen3" and self.head_dim is None),
            ("sliding_window", uses_window and "sliding_window" not in self.model_fields_set),
            (
                "original_max_position_embeddings",
                self.rope.rope_type == "yarn" and self.rope.original_max_position_embeddings is None,
            ),
        ):
            if is_open:
                raise PydanticCustomError(_LEFT_TO_DEFAULT, "{name} is missing", {"name": name})
        return self

    @model_validator(mode="after")
    def _check_support(self) -> Self:
        has_window = self.model_type in ("llama", "mistral", "mixtral") or self.use_sliding_window
        if has_window and self.sliding_window is not None:
            raise UserError(
                f"sliding_window={self.sliding_window} is not supported; supported: null "
                "(long-context alignment needs full attention)"
            )
        if self.clip_qkv is not None:
            raise UserError(f"clip_qkv={self.clip_qkv} is not supported; supported: null")
        if self.original_max_position_embeddings is not None and self.rope.rope_type in ("llama3", "yarn"):
            raise UserError("original_max_position_embeddings is supported inside rope_parameters only")
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        heads, groups, width = self.num_attention_heads, self.num_key_value_heads, self.width_of_heads
        if self.model_type == "llama" and self.hidden_size % heads:
            raise UserError(f"num_attention_heads={heads} must divide hidden_size={self.hidden_size}")
        if heads % groups:
            raise UserError(f"num_key_value_heads={groups} must divide num_attention_heads={heads}")
        if self.model_type == "olmoe" and heads * width != self.hidden_size:
            raise UserError(f"num_attention_heads={heads} x head_dim={width} must be hidden_size={self.hidden_size}")
        if width < 1 or width % 2:
            raise UserError(f"head_dim={width} is not supported; supported: even numbers")
        if (shape := self.experts) is not None:
            if shape.topk > shape.num_experts:
                raise UserError(f"num_experts_per_tok={shape.topk} is more than the {shape.num_experts} experts")
            if shape.topk == 1 and shape.renormalizes:
                raise UserError("num_experts_per_tok=1 is not supported with norm_topk_prob=true: no router can learn")
            if not any(shape.layers):
                raise UserError("decoder_sparse_step and mlp_only_layers leave no layer with experts")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise UserError(
                f"layer_types names {len(self.layer_types)} layers, but num_hidden_layers={self.num_hidden_layers}"
            )
        return self


def _validate(fields: dict[str, Any]) -> tuple[_Config | None, list[Any]]:
    """The config, or pydantic's list of problems."""
    try:
        return _Config.model_validate(fields), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


def _is_left_open(problem: Mapping[str, Any]) -> bool:
    """Whether a field is left to its default: it is missing or null."""
    return problem["type"] in ("missing", _LEFT_TO_DEFAULT) or problem["input"] is None


def _described(problem: Mapping[str, Any]) -> str:
    """One line for a problem. It names the supported values where they are a short list."""
    if problem["type"] == "value_error" and isinstance(problem["ctx"]["error"], UserError):
        return str(problem["ctx"]["error"])  # one of the checks above, which names the field itself
    if problem["type"] == "literal_error":
        supported = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        return f"{'.'.join(map(str, problem['loc']))}={problem['input']!r} is not supported; supported: {supported}"
    return describe_problem(problem, CONFIG)

"""What a `config.json` states twice. Loaders differ in the statement that they take, so both must say the same.

transformers 5 reads `rope_parameters` and `dtype`; transformers 4 and older servers read `rope_theta`, `rope_scaling`
and `torch_dtype`. transformers chooses a model's class by `model_type`, vLLM by `architectures`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""transformers' class for each supported model_type."""
_ROPE = ("rope_parameters", "rope_scaling")
# vLLM and parts of transformers take a model's sizes from these, instead of from the fields beside them.
_NESTED = ("text_config", "text_encoder", "decoder", "generator", "thinker_config", "llm_config")


def contradictions(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each pair of statements that differ: both values, and what to change.

    Args:
        fields: of a config.json whose single fields are right.
    """
    yield from _thetas(fields)
    yield from _rotations(fields)
    experts = {name: fields[name] for name in ("num_experts", "num_local_experts") if fields.get(name) is not None}
    if len(set(experts.values())) > 1:
        yield f"{_both(experts)}; loaders differ in the one that they read: remove the wrong one"
    dtypes = {name: str(fields[name]).removeprefix("torch.") for name in ("dtype", "torch_dtype") if fields.get(name)}
    if len(set(dtypes.values())) > 1:
        yield f"{_both(dtypes)}; transformers 5 reads the first, transformers 4 the second: remove the wrong one"
    for name in _NESTED:
        if isinstance(fields.get(name), dict):
            yield (
                f"{name} holds a second config beside num_hidden_layers, hidden_size and so on; loaders differ in the "
                f"one that they read: remove {name}, or take the text model alone"
            )
    yield from _classes(fields)


def _thetas(fields: Mapping[str, Any]) -> Iterator[str]:
    stated = {
        f"{name}.rope_theta": fields[name]["rope_theta"]
        for name in _ROPE
        if (fields.get(name) or {}).get("rope_theta") is not None
    }
    if fields.get("rope_theta") is not None:
        stated = {"rope_theta": fields["rope_theta"]} | stated
    if any(value != other for value in stated.values() for other in stated.values()):
        yield f"{_both(stated)}; loaders differ in the one that they read: remove the wrong one"


def _rotations(fields: Mapping[str, Any]) -> Iterator[str]:
    """Compare the kinds of rotation and their numbers. An absent statement is none, but null says: no scaling."""
    for name in _ROPE:
        rope = fields.get(name)
        if isinstance(rope, dict) and rope.get("type", rope.get("rope_type")) != rope.get(
            "rope_type", rope.get("type")
        ):
            types = {f"{name}.rope_type": rope["rope_type"], f"{name}.type": rope["type"]}
            yield f"{_both(types)}; loaders differ in the one that they read: remove the wrong one"
    if not fields.get("rope_parameters") or "rope_scaling" not in fields:
        return
    if _normal(fields["rope_parameters"]) != _normal(fields["rope_scaling"] or {}):
        stated = {name: fields[name] for name in _ROPE}
        yield f"{_both(stated)}; transformers 4 reads the second alone: remove the wrong one"


def _normal(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The kind of rotation and its numbers, without theta, which older configs state elsewhere."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    left_out = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    return {"rope_type": kind} | {name: value for name, value in rope.items() if name not in left_out}


def _classes(fields: Mapping[str, Any]) -> Iterator[str]:
    """`architectures` may name a class of the model's own code (auto_map), which nobody here runs."""
    expected, stated = CLASSES.get(str(fields.get("model_type"))), fields.get("architectures")
    if expected and stated and expected not in stated and not fields.get("auto_map"):
        yield (
            f"architectures={stated} and model_type={fields['model_type']!r}; vLLM goes by the first, transformers by "
            f"the second: set architectures to [{expected!r}], or model_type to that of the weights"
        )


def _both(stated: Mapping[str, Any]) -> str:
    return " and ".join(f"{name}={value!r}" for name, value in stated.items()) + " differ"

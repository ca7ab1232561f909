"""Extends the mapping table by the adapters of LoRA: PEFT's tensors, and the Megatron parameters made of them.

Megatron computes several of PEFT's modules in one linear layer. Its adapter holds their matrices in two parameters:

    lora_A    the A of each module below each other, [modules * rank, in]
    lora_B    the B of each module, with the rows in the order of the linear layer's own, [rows of the modules, rank]
"""

from megatron_solopo.architecture.adapters import ADAPTER, AdaptedLinear, adapted_linears
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.checkpoint.mapping import Fusion, Rule, huggingface_shapes
from megatron_solopo.config import LoRAConfig

_BLOCKS = {"self_attention": "self_attn", "mlp": "mlp"}


def adapter_rules(architecture: ModelShape, lora: LoRAConfig) -> dict[str, Rule]:
    """Every parameter of the adapters by its Megatron name, with PEFT's names of its tensors."""
    each = [rule for linear in adapted_linears(lora) for rule in _rules(linear, lora.rank)]
    table = (rule.at(layer) for layer in range(architecture.num_layers) for rule in each)
    return {rule.megatron: rule for rule in table}


def adapter_shapes(architecture: ModelShape, lora: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all of PEFT's tensors by name, in the table's order."""
    return {
        name: shape
        for rule in adapter_rules(architecture, lora).values()
        for name, shape in huggingface_shapes(rule, architecture).items()
    }


def peft_names(name: str) -> tuple[str, str]:
    """PEFT's names of A and B beside a Hugging Face weight."""
    module = f"base_model.model.{name.removesuffix('.weight')}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _rules(linear: AdaptedLinear, rank: int) -> tuple[Rule, Rule]:
    block = _BLOCKS[linear.megatron.split(".")[0]]
    names_A, names_B = zip(
        *(peft_names(f"model.layers.{{}}.{block}.{module}.weight") for module in linear.targets), strict=True
    )
    outputs = dict(zip(linear.modules, linear.outputs, strict=True))
    fusion: Fusion = "copy"
    if "q_proj" in linear.modules:
        fusion = "qkv"
    elif len(linear.targets) == 2:
        fusion = "gate_up"
    prefix = f"decoder.layers.{{}}.{linear.megatron}{ADAPTER}."
    return (
        Rule(
            prefix + "lora_A",
            names_A,
            (f"{rank} {linear.inputs}",) * len(linear.targets),
            shard_dim=None if linear.is_column_parallel else 1,
        ),
        Rule(
            prefix + "lora_B",
            names_B,
            tuple(f"{outputs[module]} {rank}" for module in linear.targets),
            fusion,
            shard_dim=0 if linear.is_column_parallel else None,
        ),
    )

"""A tiny model with a tokenizer, its Megatron checkpoint in a run directory, and the checkpoint's export."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2MoeConfig

from megatron_solopo.checkpoint.conversion import export_model, import_model
from tests.data.tiny_tokenizers import write_hugging_face

MAX_POSITIONS = 2048
CHECKPOINT = "iter_0000010"


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def make_model(path: Path, *, with_experts: bool = False) -> Path:
    """Random weights whose logits rounding does not decide between."""
    write_hugging_face(path, vocab_size=400)
    kind, experts = (
        (Qwen2MoeConfig, EXPERTS | {"shared_expert_intermediate_size": 16}) if with_experts else (Qwen2Config, {})
    )
    config = kind(
        **experts,
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 3.0 if name.startswith("lm_head") else 0.15
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=std)
    model.save_pretrained(path)
    return path


def make_run(folder: Path) -> tuple[Path, Path]:
    """A run directory as `train` leaves it, and the Hugging Face export of its checkpoint."""
    checkpoint = folder / "run" / "checkpoints" / CHECKPOINT
    import_model(make_model(folder / "model"), checkpoint, verification="none")
    (checkpoint / "trainer.json").write_text(json.dumps({"step": 10}))
    (checkpoint.parent / "latest").write_text(f"{CHECKPOINT}\n")
    (folder / "run" / "config.yaml").write_text("run_dir: run\n")
    export_model(checkpoint, folder / "exported", dtype=None, verification="none")
    return folder / "run", folder / "exported"

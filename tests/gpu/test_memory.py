"""Memory on one GPU: long packs fit, and the head's does not grow with the prompt."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_solopo.data.packing import TokenizedTriplet, build_pack
from megatron_solopo.model.build import build_model
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel import topology
from megatron_solopo.train.policy import Policy, build_optimizer, build_scheduler, wrap_data_parallel
from megatron_solopo.train.step import ReferenceLogprobs, objective_loss

pytestmark = pytest.mark.gpu

SOLOPO = ObjectiveConfig()
VOCAB_SIZE, RESPONSE = 151_936, 512
FULL_LOGITS_BYTES = 131_072 * VOCAB_SIZE * 2


def peak_bytes(folder: Path, long_prompt: int) -> int:
    """Peak memory of one SoLo-DPO step of a two-layer model with a large vocabulary."""
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=262_144,
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder)
    architecture = read_architecture(folder)
    generator = np.random.default_rng(0)
    lengths = {"short": 1024, "long": long_prompt}
    prompts = {name: generator.integers(VOCAB_SIZE, size=length) for name, length in lengths.items()}
    responses = {name: generator.integers(VOCAB_SIZE, size=RESPONSE) for name in ("chosen", "rejected")}
    groups = topology.initialize(ParallelConfig(), seed=1)
    try:
        model = ModelConfig(path=folder, dtype="bfloat16", implementation="transformer_engine")
        parallel = ParallelConfig(recompute_granularity="full")
        resolved = resolve_model(model, parallel, architecture=architecture)
        chunks = build_model(resolved, chunk_tokens=512, device=groups.device)
        for parameter in chunks[0].parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        wrapped = wrap_data_parallel(chunks, OptimizerConfig(), parallel)
        optimizer = build_optimizer(wrapped, OptimizerConfig())
        policy = Policy(wrapped, optimizer, build_scheduler(optimizer, OptimizerConfig(), 2))
        roles = SOLOPO.roles.all
        pack = build_pack(
            [TokenizedTriplet("0", 0, prompts, responses)],
            roles,
            groups.sequence_multiple,
            groups.pack_multiple(),
            share_prompts=False,
        )
        torch.cuda.reset_peak_memory_stats()
        references = ReferenceLogprobs(roles, torch.zeros(1, len(roles)))
        policy.step([pack], objective_loss(SOLOPO, references, groups), groups)
        return torch.cuda.max_memory_allocated()
    finally:
        topology.destroy(groups)


def test_a_pack_of_128k_fits_without_its_logits(tmp_path: Path) -> None:
    short, long = (peak_bytes(tmp_path / str(length), length) for length in (8_192, 131_072))
    print(f"peak at 8K {short / 2**30:.2f} GiB, at 128K {long / 2**30:.2f} GiB")
    # What grows is the layers' activations, of which one layer's are alive; full bfloat16 logits alone are 37 GiB.
    assert long - short < FULL_LOGITS_BYTES / 4

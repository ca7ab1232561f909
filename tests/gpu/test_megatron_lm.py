"""Megatron-LM's `pretrain()` on one GPU, with Transformer Engine's layers and NCCL, against our own trainer."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_solopo.train.trainer import precompute_reference, train
from tests.gpu.models import VOCAB_SIZE, make_model
from tests.integrations.megatron_runs import STEPS, arguments, config, pretrain, recorded
from tests.prepared import make_prepared

pytestmark = pytest.mark.gpu

TE: dict[str, Any] = {
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "seq_length": 4096,
    "transformer_impl": "transformer_engine",
    "distributed_backend": "nccl",
    "bf16": True,
}
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}


def test_pretrain_gives_our_trainers_losses_and_gradient_norms(tmp_path: Path) -> None:
    pytest.importorskip("megatron.training", reason="this megatron-core has no megatron.training")
    pytest.importorskip("transformer_engine")
    for seed, name in enumerate(("model", "reference_model")):
        make_model(tmp_path / name, "qwen2_tied", seed)
    make_prepared(tmp_path / "prepared", rows=10, eval_count=0, seed=0)
    settings = config(tmp_path, "ours", {}, model={"path": tmp_path / "model", "dtype": "bfloat16"})
    precompute_reference(settings, overwrite=False)
    train(settings)
    with mock.patch.dict(os.environ, ONE_RANK):
        try:
            theirs = pretrain(arguments(tmp_path, "theirs", {"micro_batch_size": 2} | TE))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    ours = recorded(tmp_path, "ours")
    assert len(ours) == len(theirs) == STEPS
    # bfloat16, and other kernels here and there (fused rotary embedding, gradient accumulation).
    for name in ("loss", "grad_norm"):
        found, wanted = ([step[name] for step in steps] for steps in (theirs, ours))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=5e-2, atol=0)

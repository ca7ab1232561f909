"""Optimizer state between torch's Adam, a fused one that counts per group, and Megatron's hybrid of both."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_solopo.checkpoint import load as distributed
from megatron_solopo.checkpoint.optimizer_state import complete_group, load_state, portable


def hybrid() -> HybridDeviceOptimizer:
    """Megatron's own, with everything on the CPU."""
    parameter = torch.nn.Parameter(torch.ones(4))
    adam = {"cpu_optimizer_cls": torch.optim.AdamW, "gpu_optimizer_cls": torch.optim.AdamW}
    return HybridDeviceOptimizer([parameter], **adam, overlap_cpu_optimizer_d2h_h2d=False, lr=0.1)


def test_a_hybrid_optimizers_groups_can_be_read_without_running_code(tmp_path: Path) -> None:
    groups = hybrid().state_dict()["param_groups"]
    torch.save({"optimizer": {"param_groups": groups}}, tmp_path / "as_is.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "as_is.pt", weights_only=True)
    torch.save(portable({"optimizer": {"param_groups": groups}, "param_state": 1}), tmp_path / "portable.pt")
    read = torch.load(tmp_path / "portable.pt", weights_only=True)
    kept = {key for key, value in groups[0].items() if not isinstance(value, type)}
    assert read["optimizer"]["param_groups"][0].keys() == kept and read["param_state"] == 1


def test_a_hybrid_optimizer_counts_on_after_it_was_loaded() -> None:
    """Its groups override those inside before every step: a `step` left there would stand still."""
    optimizer = hybrid()
    loaded = mock.Mock(spec=DistributedOptimizer, optimizer=optimizer)
    loaded.load_state_dict.side_effect = lambda state: optimizer.param_groups[0].update(step=7)
    load_state(loaded, {"param_state": {}, "optimizer": {"param_groups": [{"lr": 0.1}]}})
    assert all("step" not in group for group in optimizer.param_groups)


def test_a_group_of_another_adam_is_completed() -> None:
    class FusedAdam(torch.optim.AdamW):
        """Counts per group, and reads a key of its own from there."""

        def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
            super().__init__(parameters, lr=0.1)
            self.defaults["bias_correction"] = True

    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(1))])
    group = complete_group(optimizer, {"lr": 0.5, "step": 3.0})
    assert group["bias_correction"] is True and group["lr"] == 0.5
    assert group["step"] == 3 and isinstance(group["step"], int)
    assert "step" not in complete_group(optimizer, {"lr": 0.5})


@pytest.mark.parametrize(("fp8", "recipe", "kept"), [(None, "delayed", False), ("hybrid", "blockwise", False),
                                                     ("hybrid", "delayed", True)])  # fmt: skip
def test_scales_made_of_earlier_steps_are_saved_and_no_other_kernel_state(fp8, recipe, kept) -> None:
    module = SimpleNamespace(
        config=SimpleNamespace(fp8=fp8, fp8_recipe=recipe),
        sharded_state_dict=lambda metadata: {"linear.weight": 1, "linear._extra_state": 2},
    )
    assert ("linear._extra_state" in distributed._sharded_model(module, {})) is kept

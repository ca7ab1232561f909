"""The configuration of a mixture of experts for one node of SLURM: it is legal, and its state fits on the GPUs."""

import pytest

from megatron_solopo.architecture.gpus import GPUS
from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.architecture.layout import check_layout, check_training, check_world_size
from megatron_solopo.config import load_config
from megatron_solopo.errors import UserError
from megatron_solopo.plan.memory import GIB, rank_state
from tests.plan.models import PLANS, ROOT

GPUS_OF_THE_NODE = 8


def test_a_node_shares_the_experts_of_qwen3_30b() -> None:
    config = load_config(ROOT / "examples/slurm/qwen3-30b-a3b.yaml")
    architecture = read_architecture(PLANS / "models/qwen3-30b-a3b")
    check_world_size(config.parallel, GPUS_OF_THE_NODE)
    check_layout(architecture, config.parallel)
    check_training(architecture, config.parallel, config.optimizer, config.moe)
    state = rank_state(architecture, config, 0, data_parallel_size=1)
    assert architecture.experts is not None and architecture.experts.num_experts == 16 * GPUS_OF_THE_NODE
    assert 60 < state.total / GIB < 0.6 * GPUS["h200"].memory_gib
    with pytest.raises(UserError, match="needs a multiple of 8"):
        check_world_size(config.parallel, GPUS_OF_THE_NODE // 2)

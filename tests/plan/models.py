"""What tests of plans share: a published model's shape, a configuration, lengths."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_solopo.architecture.gpus import GPUS, Gpu
from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.config import Config, load_config
from megatron_solopo.plan.layouts import Layout, make_layout, replace_settings
from megatron_solopo.plan.search import LayoutEstimate, Planner
from megatron_solopo.plan.workload import stated_workload

ROOT = Path(__file__).resolve().parents[2]
PLANS = ROOT / "examples" / "plans"
TOKENS = "short=3584,long=130560,response=512"


def load_example(model: str, *overrides: str) -> tuple[Config, Architecture]:
    """A configuration of examples/plans and its model."""
    config = load_config(PLANS / f"{model}.yaml", overrides)
    return config, read_architecture(ROOT / config.model.path)


def make_planner(
    model: str = "llama-3.1-8b",
    *overrides: str,
    gpus: int = 64,
    gpu: Gpu = GPUS["h100"],
    tokens: str = TOKENS,
    num_triplets: int = 1000,
    **more: Any,
) -> Planner:
    config, architecture = load_example(model, *overrides)
    return Planner(architecture, config, stated_workload(tokens, num_triplets, 512), gpu, gpus, **more)


def with_load(planner: Planner, load: float) -> Planner:
    """The planner with another load of the fullest expert."""
    architecture = planner.architecture
    assert architecture.experts is not None
    experts = replace(architecture.experts, load_max_over_mean=load)
    return replace(planner, architecture=replace(architecture, experts=experts))


def estimate(
    planner: Planner,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    **sections: dict[str, Any],
) -> LayoutEstimate:
    """Estimate a layout of these sizes with some keys of some sections changed."""
    sizes = {"tp": tp, "pp": pp, "vpp": None, "cp": cp, "ep": ep, "etp": etp}
    layout = make_layout(planner.config, sizes, planner.gpus)
    return planner.estimate(Layout(replace_settings(layout.config, **sections), layout.data_parallel_size))

"""Plans that are kept: what the command says today, their dry runs clean, their scripts accepted by SLURM."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from megatron_solopo.config import load_config
from megatron_solopo.plan.layouts import Layout
from megatron_solopo.plan.memory import GIB
from tests.plan.models import PLANS, ROOT, TOKENS, make_planner
from tests.plan.slurm import CONTROLLER, controller, judge


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_plans", PLANS / "make_plans.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()
CASES = list(GENERATOR.cases())
LAUNCH = PLANS / "launch"
FITTING = [name for name, _ in CASES if (LAUNCH / name).is_dir()]


def test_all_models_sizes_and_types_are_there() -> None:
    assert len(CASES) == 4 * 4 * 2 and TOKENS == GENERATOR.TOKENS
    assert {path.stem for path in LAUNCH.glob("*.txt")} == {name for name, _ in CASES}
    assert {path.name for path in LAUNCH.iterdir() if path.is_dir()} == set(FITTING)
    # A 70B model's state alone is more than eight H100 hold beside a context of 131,072 tokens.
    assert {name for name, _ in CASES} - set(FITTING) == {"llama-3.1-70b-8xh100", "qwen2.5-72b-8xh100"}


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=[name for name, _ in CASES])
def test_a_kept_plan_is_todays(name: str, arguments: list[str]) -> None:
    text = (LAUNCH / f"{name}.txt").read_text(encoding="utf-8")
    assert text.startswith(f"$ megatron-solopo {' '.join(arguments)}\n")
    if name not in FITTING:
        assert re.search(r"error: no layout fits on .*: [\d.]+ GiB over", text)
        return
    config = load_config(LAUNCH / name / "config.yaml")
    model, gpus, gpu = re.fullmatch(r"(.+)-(\d+)x(h\d00)", name).groups()
    planner = make_planner(
        model, gpus=int(gpus), gpu=importlib.import_module("megatron_solopo.architecture.gpus").GPUS[gpu]
    )
    config = config.model_copy(update={"model": planner.config.model, "run_dir": planner.config.run_dir})
    layout = Layout(config, int(gpus) // config.parallel.model_parallel_size)
    estimate = planner.estimate(layout)
    assert f"{layout.name} on {gpus} x" in text and estimate.excess_gib <= 0
    assert f"  together {estimate.time.seconds:.3f}: " in text
    assert f"{estimate.fullest.total / GIB:.2f}" in text
    ranks = text[text.index("Dry run:") :].splitlines()[3:]
    assert len(ranks) >= 2 and all("  equal  " in f"{line}  " for line in ranks)


@pytest.mark.skipif(CONTROLLER is None, reason="SLURM is not installed")
def test_slurm_accepts_every_script_and_no_larger_one(tmp_path: Path) -> None:
    with controller(tmp_path) as environment:
        for name in FITTING:
            judged = judge(LAUNCH / name / "submit.sbatch", environment)
            nodes = max(1, int(re.search(r"-(\d+)x", name)[1]) // 8)
            assert judged.returncode == 0 and "to start at" in judged.stderr, judged.stderr
            assert f"using {64 * nodes} processors" in judged.stderr
        text = (LAUNCH / "llama-3.1-8b-1024xh100" / "submit.sbatch").read_text()
        larger = tmp_path / "larger.sbatch"
        larger.write_text(text.replace("--nodes=128", "--nodes=129"))
        assert "not available" in judge(larger, environment).stderr


@pytest.mark.parametrize("name", FITTING)
def test_a_script_names_its_configuration_and_its_ranks(name: str) -> None:
    script = (LAUNCH / name / "submit.sbatch").read_text(encoding="utf-8")
    config = re.search(r"^launch (\S+)", script, re.MULTILINE)[1]
    assert (ROOT / config).is_file()
    nodes, per_node = (int(re.search(rf"--{key}=(\d+)", script)[1]) for key in ("nodes", "gpus-per-node"))
    assert f"-{nodes * per_node}x" in name and f'"${{GPUS_PER_NODE:={per_node}}}"' in script

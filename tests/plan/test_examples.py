"""The plans in examples/plans/launch are what the command writes today, and SLURM accepts its scripts."""

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

from megatron_solopo.cli.main import cli
from megatron_solopo.config import load_config
from tests.plan.models import PLANS, ROOT, TOKENS
from tests.plan.slurm import CONTROLLER, NODES, controller, judge


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_plans", PLANS / "make_plans.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()
ARGUMENTS = GENERATOR.plan_arguments()
LAUNCH = PLANS / "launch"
LONG_SEARCHES = ("qwen3-30b-a3b-64xh100", "qwen3-235b-a22b-256xh100", "qwen3-235b-a22b-1024xh100")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the paths of the examples start there


def plan(name: str, *more: str) -> Result:
    return CliRunner().invoke(cli, [*ARGUMENTS[name], *more])


def test_the_repository_keeps_some_of_the_plans() -> None:
    assert len(ARGUMENTS) == 6 * 4 * 2 + 1 and TOKENS == GENERATOR.TOKENS
    assert {path.name for path in LAUNCH.iterdir()} == {*GENERATOR.KEPT, *(f"{name}.txt" for name in GENERATOR.KEPT)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG_SEARCHES else []) for name in GENERATOR.KEPT]
)
def test_a_kept_plan_is_what_the_command_writes_today(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    result = plan(name, "--emit-sbatch", str(folder))
    assert result.exit_code == 0, result.output
    command, text = (LAUNCH / f"{name}.txt").read_text(encoding="utf-8").split("\n\n", 1)
    text, dry_run = text.split("\n\nDry run:")
    kept = str((LAUNCH / name).relative_to(ROOT))
    assert command == f"$ megatron-solopo {' '.join(ARGUMENTS[name])} --dry-run --emit-sbatch {kept}"
    assert text == result.stdout.rstrip("\n")
    dry_run, startup = dry_run.split("\n\n")
    assert startup.startswith("Start-up: not counted: ") and "prepared directory" in startup
    ranks = dry_run.splitlines()[3:]
    assert len(ranks) >= 2 and all("  equal  " in f"{line}  " for line in ranks)
    assert load_config(LAUNCH / name / "config.yaml") == load_config(folder / "config.yaml")
    assert (LAUNCH / name / "submit.sbatch").read_text() == (folder / "submit.sbatch").read_text().replace(
        str(folder), kept
    )


def test_eight_gpus_of_80_gb_do_not_hold_a_70b_model() -> None:
    result = plan("llama-3.1-70b-8xh100")
    assert result.exit_code == 2
    assert re.search(r"no layout fits on 8 x H100; .*: does not fit: [\d.]+ GiB over 79.1 GiB", result.output)


@pytest.mark.skipif(CONTROLLER is None, reason="SLURM is not installed")
def test_slurm_accepts_every_script_and_no_larger_one(tmp_path: Path) -> None:
    with controller(tmp_path) as environment:
        for gpus, layout in ((8, "cp=8"), (64, "tp=8,cp=8"), (1024, "tp=8,pp=4,cp=4")):
            folder = tmp_path / str(gpus)
            result = plan(f"llama-3.1-8b-{gpus}xh200", "--explain", layout, "--emit-sbatch", str(folder))
            assert result.exit_code == 0, result.output
            judged = judge(folder / "submit.sbatch", environment)
            assert judged.returncode == 0 and "to start at" in judged.stderr, judged.stderr
            assert f"using {64 * gpus // 8} processors" in judged.stderr
        larger = tmp_path / "larger.sbatch"
        text = (folder / "submit.sbatch").read_text()
        assert f"--nodes={NODES}\n" in text
        larger.write_text(text.replace(f"--nodes={NODES}\n", f"--nodes={NODES + 1}\n"))
        assert "not available" in judge(larger, environment).stderr


@pytest.mark.parametrize("name", GENERATOR.KEPT)
def test_a_script_names_its_configuration_and_its_ranks(name: str) -> None:
    script = (LAUNCH / name / "submit.sbatch").read_text(encoding="utf-8")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    config = re.search(r"^launch (\S+)", script, re.MULTILINE)[1]
    assert (ROOT / config).is_file()
    nodes, per_node = (int(re.search(rf"--{key}=(\d+)", script)[1]) for key in ("nodes", "gpus-per-node"))
    assert f"-{nodes * per_node}x" in name and f'"${{GPUS_PER_NODE:={per_node}}}"' in script

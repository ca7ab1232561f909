"""`megatron-solopo plan` as a user runs it."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from megatron_solopo.architecture.flops import forward_flops
from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.cli import main as cli
from megatron_solopo.config import LoRAConfig, load_config
from tests.plan.models import PLANS, ROOT, TOKENS
from tests.prepared import make_prepared
from tests.tiny_models import make_model

SEVENTY = ["--config", str(PLANS / "llama-3.1-70b.yaml"), "--tokens", TOKENS]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the examples' paths start there


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, ["plan", *arguments], catch_exceptions=True)


def refusal(capsys: Any, *arguments: str) -> str:
    """The error line, by way of the real entry point."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_json_says_everything_and_the_overrides_make_the_layout() -> None:
    result = plan(*SEVENTY, "--gpus", "64", "--gpu", "h200", "--json", "--price", "2.5", "--top", "3")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    best, vanilla = found["chosen"], found["other_objective"]
    assert (best["objective"], vanilla["objective"]) == ("solopo", "long_po")
    assert best == found["ranking"][0] and len(found["ranking"]) == 3
    assert best["fits"] and best["gpus"] == 64 and 0.2 < best["mfu"] < 0.65
    assert best["cost"] == pytest.approx(2.5 * best["gpu_hours"]) and best["reference_seconds"] > 0
    # By the formulae: of L + 2 A where both answers share the long prompt, and of (L + A) + (S + 2 A).
    short, long, answer = 3584, 130560, 512
    squares = [2 * (long + answer) ** 2 - long**2, (long + answer) ** 2 + 2 * (short + answer) ** 2 - short**2]
    tokens = [long + 2 * answer, long + answer + short + 2 * answer]
    model = read_architecture(ROOT / load_config(PLANS / "llama-3.1-70b.yaml").model.path)
    flops = [forward_flops(model, *each, 0).total for each in zip(tokens, squares, strict=True)]
    assert vanilla["hours"] / best["hours"] == pytest.approx(flops[0] / flops[1], rel=0.05)
    config = load_config(PLANS / "llama-3.1-70b.yaml", best["overrides"])
    assert config.parallel.tensor_model_parallel_size == best["layout"]["tp"]
    for stage in best["memory_bytes"]:
        parts = sum(stage[name] for name in stage if name not in ("pipeline_rank", "total", "host", "packs_in_flight"))
        assert parts == pytest.approx(stage["total"]) and stage["total"] <= found["gpu"]["memory_gib"] * 2**30


def test_a_plan_of_prepared_data_with_everything_written(tmp_path: Path) -> None:
    make_prepared(tmp_path / "prepared", rows=40, eval_count=2, seed=0)
    overrides = [f"data.path={tmp_path / 'prepared'}", "data.max_tokens_per_pack=512"]
    config = ["--config", str(PLANS / "llama-3.1-8b.yaml"), "training.global_batch_size=16", *overrides]
    options = ["--explain", "tp=2,pp=2", "--picture", str(tmp_path / "plan.png"), "--why-not", "--vary", "recompute"]
    launch = tmp_path / "launch"
    result = plan(*config, "--gpus", "16", "--gpu", "h100", *options, "--emit-sbatch", str(launch))
    assert result.exit_code == 0, result.output
    assert "tp2,pp2,cp1,dp4 on 16 x H100" in result.stdout and "38 triplets" in result.stdout
    assert "tp8,pp8,cp1,dp1" not in result.stdout and "do not divide into" in result.stdout
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    written = load_config(launch / "config.yaml")
    assert written.parallel.pipeline_model_parallel_size == 2 and written.training.global_batch_size == 16
    script = (launch / "submit.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in script and f"\nlaunch {launch}/config.yaml " in script
    subprocess.run(["bash", "-n", str(launch / "submit.sbatch")], check=True)


def test_overrides_state_what_the_command_line_stated_and_what_is_left_out_is_named() -> None:
    eight = ["--config", str(PLANS / "llama-3.1-8b.yaml"), "--tokens", TOKENS, "--gpus", "8", "--gpu", "h200"]
    stages = "Et*7|(t*9|)*2t*7L"
    given = [
        f"parallel.pipeline_model_parallel_layout={stages}",
        "parallel.sequence_parallel=false",
        "objective.beta=0.2",
    ]
    kept = plan(*eight, *given, "--explain", "pp=4,cp=2", "--vary", "recompute")
    assert kept.exit_code == 0, kept.output
    (line,) = [line for line in kept.stdout.splitlines() if line.startswith("Overrides: ")]
    overrides = shlex.split(line.removeprefix("Overrides: "))
    assert f"'parallel.pipeline_model_parallel_layout={stages}'" in line, "in quotes for a shell"
    config = load_config(PLANS / "llama-3.1-8b.yaml", overrides)
    assert config.parallel.pipeline_model_parallel_layout == stages and config.objective.beta == 0.2
    left = "note: tp1,pp4,cp2,dp1 leaves out parallel.sequence_parallel=false, which the configuration states"
    assert left in kept.stdout.splitlines()

    dropped = json.loads(plan(*eight, *given, "--explain", "pp=2,cp=4", "--json").stdout)["chosen"]
    assert dropped["left_out"] == [f"parallel.pipeline_model_parallel_layout={stages}", given[1]]
    assert "parallel.pipeline_model_parallel_layout=null" in dropped["overrides"]
    assert load_config(PLANS / "llama-3.1-8b.yaml", dropped["overrides"]).objective.beta == 0.2


def test_a_key_without_effect_is_named_in_the_words_of_training() -> None:
    eight = ["--config", str(PLANS / "llama-3.1-8b.yaml"), "--tokens", TOKENS, "--gpus", "8", "--gpu", "h200"]
    by_heads = [*eight, "--explain", "cp=2", "--vary", "recompute", "parallel.cp_comm_type=a2a", "--json"]
    shared, separate = (
        json.loads(plan(*by_heads, f"data.share_prompts={shares}").stdout)["chosen"] for shares in ("true", "false")
    )
    why = "(data.share_prompts=true: attention gathers keys and values)"
    assert shared["without_effect"] == f"warning: no effect in this run: parallel.cp_comm_type=a2a {why}"
    assert separate["without_effect"] is None
    text = plan(*by_heads[:-1], "optimizer.min_lr=1e-7", "optimizer.lr_decay_style=constant").stdout
    (line,) = [line for line in text.splitlines() if "no effect" in line]
    assert line.startswith("warning: ") and "optimizer.min_lr=1e-07 (" in line and f"cp_comm_type=a2a {why}" in line


def test_adapters_and_the_whole_model_side_by_side() -> None:
    """With the optimizer's state on the GPUs, adapters of a 70B model fit on a node, and the model as a whole does not.

    The configuration asks for the whole model. So the plan shows what fits.
    """
    node = [*SEVENTY, "--gpus", "8", "--gpu", "h200", "objective.name=short_po", "--vary", "recompute,lora"]
    text = plan(*node).stdout
    assert "\ntrains adapters of rank 16: 207,093,760 parameters\n" in text
    assert re.search(
        r"^the whole model: no layout fits; \S+: does not fit: [\d.]+ GiB over 139.8 GiB", text, re.MULTILINE
    )
    found = json.loads(plan(*node, "--json").stdout)
    best, other = found["chosen"], found["other_weights"]
    assert best["trained"] == "adapters of rank 16" and other["trained"] == "the whole model" and not other["fits"]
    assert load_config(PLANS / "llama-3.1-70b.yaml", best["overrides"]).lora == LoRAConfig()
    for stage in best["memory_bytes"]:
        assert 50 * (stage["parameters"] + stage["gradients"] + stage["optimizer"]) < stage["base"]
    # Adapters of the configuration come first. A layout that is asked for is shown with both.
    asked = json.loads(plan(*node, "--explain", "tp=8", "lora.rank=4", "--json").stdout)
    assert asked["chosen"]["trained"] == "adapters of rank 4" and not asked["other_weights"]["fits"]
    assert asked["chosen"]["layout"] == asked["other_weights"]["layout"]
    assert load_config(PLANS / "llama-3.1-70b.yaml", asked["other_weights"]["overrides"]).lora is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="would turn this whole process to the CPU")
def test_the_dry_run_of_the_command_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_SOLOPO_DEVICE", "cpu")  # what the command sets, undone afterwards
    result = plan(*SEVENTY, "--gpus", "64", "--gpu", "h200", "--explain", "tp=8,pp=2,cp=4", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)["dry_run"]
    assert [check["rank"] for check in checks] == [0, 31, 32, 63] and all(check["equal"] for check in checks)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "64", "--gpu", "rtx"], "--gpu rtx: unknown"),
        (["--gpus", "12", "--gpu", "h100"], "--gpus 12: must be a multiple of 8"),
        (["--gpus", "64", "--gpu", "h100", "--explain", "tp=3"], "needs a multiple of 3"),
        (["--gpus", "64", "--gpu", "h100", "--explain", "tp=x"], "'tp=x' is none of tp=N"),
        (["--gpus", "8", "--gpu", "h100", "training.global_batch_size=7"], "no layout fits on 8 x H100"),
        (["--gpus", "64", "--gpu", "h100", "data.max_tokens_per_pack=1000"], "no layout fits on 64 x H100"),
        (["--gpus", "64", "--gpu", "h100", "--calibration", "none.json"], "none.json: no such file"),
        (["--gpus", "64", "--gpu", "h100", "--gpu-file", "none.yaml"], "none.yaml: no such file"),
        (["--gpus", "64", "--gpu", "h100", "model.path=nowhere"], "nowhere/config.json: no such file"),
        (["--gpus", "64", "--gpu", "h100", "--vary", "luck"], "unknown luck"),
        (["--gpus", "64", "--gpu", "h100", "--explain", "tp=2,tp=4"], "'tp=2,tp=4': tp is stated twice"),
        (
            ["--gpus", "64", "--gpu", "h100", "parallel.pipeline_model_parallel_layout=Et*2|t*2L"],
            "must be E (embedding), then the model's 80 layers t, then L (loss), with | between stages; it has 1 E",
        ),
        (["--gpus", "64", "--gpu", "h100", "--triplets", "100"], "training.global_batch_size=128: more than the 100"),
        (["--gpus", "64", "--gpu", "a100", "model.fp8=hybrid"], "A100 has no such FP8; set model.fp8 to null"),
        (
            ["--gpus", "64", "--gpu", "h100", "model.fp8=e4m3", "model.fp8_recipe=mxfp8"],
            "H100 has no such FP8; set model.fp8 to null, or model.fp8_recipe to blockwise",
        ),
    ],
)
def test_a_mistake_is_one_line(capsys: Any, arguments: list[str], words: str) -> None:
    error = refusal(capsys, *SEVENTY, *arguments)
    assert words in error
    assert len([line for line in error.splitlines() if line.startswith(("error:", "Error:"))]) == 1


def test_lengths_beyond_the_models_positions_are_refused_as_in_training(capsys: Any) -> None:
    config = ["--config", str(PLANS / "llama-3.1-8b.yaml"), "--tokens", "short=3584,long=130561,response=512"]
    error = refusal(capsys, *config, "--gpus", "8", "--gpu", "h200")
    assert "sequences of up to 131,073 tokens" in error and "has 131,072 positions" in error
    assert plan(*config, "--gpus", "8", "--gpu", "h200", "objective.name=short_po").exit_code == 0


def test_tokens_beyond_the_vocabulary_are_refused_as_in_training(capsys: Any, tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path / "prepared", rows=8, eval_count=0, seed=0)
    model = make_model(tmp_path / "model", "qwen2")
    paths = [f"data.path={prepared}", f"model.path={model}", "training.global_batch_size=8"]
    config = ["--config", str(PLANS / "llama-3.1-8b.yaml"), "--gpus", "1", "--gpu", "h100", *paths]
    assert plan(*config).exit_code == 0
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(fields | {"vocab_size": 100}))
    assert "has embeddings for ids up to 99" in refusal(capsys, *config)


def test_lengths_must_come_from_somewhere(capsys: Any) -> None:
    error = refusal(capsys, "--config", str(PLANS / "llama-3.1-8b.yaml"), "--gpus", "8", "--gpu", "h100")
    assert "not a complete prepared directory" in error and "--tokens" in error


def test_another_directory_is_not_written_over(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    options = ["--gpus", "64", "--gpu", "h100", "--emit-sbatch", str(tmp_path)]
    assert "holds mine.txt, which would be lost" in refusal(capsys, *SEVENTY, *options)


def imported_by(*arguments: str) -> set[str]:
    """Packages that a process has loaded after a plan."""
    program = (
        "import sys; from megatron_solopo.cli.main import main; main(sys.argv[1:]); "
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    command = [sys.executable, "-c", program, "plan", *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("model", ["llama-3.1-70b", "qwen2.5-7b"])
def test_a_plan_of_stated_lengths_imports_nothing_that_is_slow(model: str) -> None:
    """Not the wall clock, which is the machine's other work too: each of these takes about a second to import."""
    config = ["--config", str(PLANS / f"{model}.yaml"), "--tokens", TOKENS]
    loaded = imported_by(*config, "--gpus", "64", "--gpu", "h200")
    assert "numpy" in loaded
    assert not loaded & {"megatron", "torch", "transformers", "datasets", "pyarrow", "pandas", "matplotlib", "scipy"}


def test_a_plan_of_prepared_data_imports_only_what_reads_it(tmp_path: Path) -> None:
    make_prepared(tmp_path / "prepared", rows=20, eval_count=2, seed=0)
    overrides = [f"data.path={tmp_path / 'prepared'}", "training.global_batch_size=16"]
    loaded = imported_by("--config", str(PLANS / "llama-3.1-8b.yaml"), *overrides, "--gpus", "8", "--gpu", "h200")
    assert "datasets" in loaded and not loaded & {"megatron", "torch", "transformers", "matplotlib"}


def test_help_answers_at_once() -> None:
    started = time.process_time()
    result = plan("--help")
    assert result.exit_code == 0 and "Examples:" in result.output and time.process_time() - started < 1

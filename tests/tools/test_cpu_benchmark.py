"""The CPU benchmark at toy sizes: it runs, its two heads agree, and its accounting sees what grows."""

import json
import subprocess
import sys

import pytest

RESPONSE_TOKENS, VOCAB_SIZE = 16, 4096
ROWS = 3 * RESPONSE_TOKENS
# In short: the heads in tests/model/test_head.py, FLOPs in tests/architecture.
MEASURED = pytest.mark.long
SIZES = [f"--response-tokens={RESPONSE_TOKENS}", f"--vocab-size={VOCAB_SIZE}", "--repeats=1"]


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.benchmarks.cpu_benchmark", *SIZES, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    run = run_benchmark("--prompt-tokens=256", "--prompt-tokens=512", "--pair", "32", "128", "--json", str(path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("response-only") == run.stdout.count("full logits") == 2, run.stdout
    assert "[5/5] measure_times" in run.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def memory(result) -> dict:
    return {(row["head"], row["prompt_tokens"]): row for row in result["memory"]}


@MEASURED
def test_the_heads_give_the_same_loss_and_gradients(memory) -> None:
    for prompt_tokens in (256, 512):
        one, other = memory["response-only", prompt_tokens], memory["full logits", prompt_tokens]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["gradient_norms"] == pytest.approx(other["gradient_norms"], rel=1e-4)
        assert one["gradient_norms"]["embedding.word_embeddings.weight"] > 0
    assert memory["full logits", 256]["loss"] != memory["full logits", 512]["loss"]


@MEASURED
def test_response_only_head_does_not_grow_with_the_prompt(memory) -> None:
    short, long = memory["response-only", 256], memory["response-only", 512]
    assert long["positions"] > 1.5 * short["positions"]
    # To the allocator's rounding of small tensors.
    assert long["head_tensor_bytes"] == pytest.approx(short["head_tensor_bytes"], rel=1e-3)
    assert short["head_tensor_bytes"] >= ROWS * VOCAB_SIZE * 4  # the logits of the response rows are seen


@MEASURED
def test_full_logits_grow_by_a_vocabulary_per_position(memory) -> None:
    short, long = memory["full logits", 256], memory["full logits", 512]
    logits_growth = (long["positions"] - short["positions"]) * VOCAB_SIZE * 4
    assert long["head_tensor_bytes"] - short["head_tensor_bytes"] == pytest.approx(logits_growth, rel=0.1)
    assert long["head_tensor_bytes"] > 9 * memory["response-only", 512]["head_tensor_bytes"]


@MEASURED
def test_the_step_holds_at_least_its_head(memory) -> None:
    for row in memory.values():
        assert row["step_tensor_bytes"] >= row["head_tensor_bytes"]
        assert row["step_resident_bytes"] > 0.5 * row["step_tensor_bytes"]


@MEASURED
def test_times_stand_beside_both_predictions(result) -> None:
    (row,) = result["times"]
    assert row["tokens_ratio"] == (128 + 2 * 32) / (2 * 128)
    assert row["wall_ratio"] == row["wall_seconds"]["solopo"] / row["wall_seconds"]["long_po"]
    assert 0 < row["cpu_seconds"]["solopo"] <= 2 * row["wall_seconds"]["solopo"]
    # Attention grows with the square, the head with the responses: three in solopo, two in long_po.
    assert 0.5 < row["flops_ratio"] < 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--vocab-size=1000"], "--vocab-size=1000"),
        (["--pair", "16", "128"], "--pair 16 128"),
        (["--pair", "128", "64"], "--pair 128 64"),
        (["--prompt-tokens=1000000000"], "choose a smaller --vocab-size"),
    ],
)
def test_impossible_sizes_are_refused(monkeypatch, arguments, complaint) -> None:
    from click.testing import CliRunner

    from tools.benchmarks import cpu_benchmark

    run = CliRunner().invoke(cpu_benchmark.main, [*SIZES, *arguments])
    assert run.exit_code == 2
    assert complaint in run.output


def test_disagreement_is_the_worst_of_all_parameters(monkeypatch) -> None:
    from tools.benchmarks.step_costs import Memory, disagreement

    def row(loss: float, **norms: float) -> Memory:
        return Memory(1, "", 1, loss, norms, 0, 0, 0)

    assert disagreement(row(2.0, a=1.0, b=4.0), row(2.0, a=1.0, b=5.0)) == pytest.approx(0.2)
    assert disagreement(row(1.0, a=1.0), row(2.0, a=1.0)) == pytest.approx(0.5)

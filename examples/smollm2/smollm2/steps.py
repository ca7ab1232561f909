"""The project's commands, as subprocesses; an output that is there is not made again."""

import os
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

from megatron_solopo.cpu_features import has_bfloat16_kernels
from megatron_solopo.errors import UserError

HERE = Path(__file__).resolve().parents[1]
PROMPT = HERE / "prompt.jinja"
TASK_ANSWER_TOKENS = 64
"""Room for an answer to a question."""


def dtype() -> str:
    """Of training and answers: bfloat16 where torch has kernels for it, else float32."""
    return "bfloat16" if has_bfloat16_kernels() else "float32"


def command(*words: object, log: Path | None = None, **variables: str) -> None:
    """Run `megatron-solopo WORDS` on one core. Its output goes to the screen, or behind what `log` holds.

    `variables` are added to the environment. Raises UserError if it fails, which names the log.
    """
    called = ["-m", "megatron_solopo", *map(str, words)]
    # Output of a library's warnings is no news to a reader of this example.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | variables
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if log is None else log.open("a", encoding="utf-8") as stream:
        code = subprocess.run([sys.executable, *called], env=environment, stdout=stream, stderr=stream).returncode
    if code:
        raise UserError(f"python {shlex.join(called)}: exit code {code}; see {log or 'what it printed above'}")


def first_lines(source: Path, output: Path, count: int | None) -> None:
    """Copy the first lines of a file; None: all."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(lines[:count]), encoding="utf-8")


def build_contexts(questions: Path, output: Path, model: Path, short_tokens: int, long_tokens: int) -> None:
    """Short and long contexts of questions in the generic format, as chat messages."""
    if not output.exists():
        command(
            *("data", "build", "--input", questions, "--format", "generic", "--output", output, "--tokenizer", model),
            *("--template", "chat", "--prompt-template", PROMPT, "--short-tokens", short_tokens),
            *("--long-tokens", long_tokens, "--response-tokens", TASK_ANSWER_TOKENS),
        )

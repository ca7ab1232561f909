"""Loads a Hugging Face directory with transformers as a stranger would: in a new process, offline, without its code.

The process starts in an empty folder and reads nothing but the directory. So no cache, no module that is imported
already and no path of this machine can hide that something is missing. Tensors that are missing, unexpected or
misshapen are only warnings in transformers; here they are errors.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_solopo.architecture.model_directory import has_tokenizer
from megatron_solopo.checkpoint.huggingface_weights import DERIVED

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_REQUEST, _TOKENS, _RESULT, _LOGITS = "request.json", "tokens.safetensors", "result.json", "logits.safetensors"
_STRICT: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_SHOWN_TENSORS, _SHOWN_CHARACTERS = 5, 300


class TransformersError(Exception):
    """transformers cannot load or run a model. The message is one line."""


def load_strictly(path: Path, sequences: list[Tensor] | None) -> tuple[str, Tensor | None]:
    """Load config, tokenizer and generation settings of a directory; with `sequences`, also the weights in fp32.

    Args:
        path: a Hugging Face directory.
        sequences: token ids, int64 [T] each; None: the weights are not loaded.

    Returns what was loaded, in a line, and the logits of all sequences, fp32 [sum of T, V].

    Raises TransformersError, naming the directory and the reason.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / _REQUEST).write_text(json.dumps(str(path.resolve())))
        if sequences is not None:
            save_file({str(number): tokens for number, tokens in enumerate(sequences)}, folder / _TOKENS)
        paths = os.pathsep.join(str(Path(each).resolve()) for each in sys.path)
        environment = os.environ | _OFFLINE | {"PYTHONPATH": paths, "HF_HOME": str(folder)}
        command = [sys.executable, "-P", "-m", __name__]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:_SHOWN_CHARACTERS]
            raise TransformersError(f"{path}: a process that loads it ended with code {done.returncode}: {last}")
        result = json.loads((folder / _RESULT).read_text())
        if "error" in result:
            raise TransformersError(f"{path}: transformers cannot load it: {result['error']}")
        return result["loaded"], load_file(folder / _LOGITS)["logits"] if sequences is not None else None


def _main() -> None:
    """The work of the new process, in its empty folder. Foreseen errors become part of the result."""
    from huggingface_hub.errors import StrictDataclassError

    path = Path(json.loads(Path(_REQUEST).read_text()))
    try:
        result = {"loaded": _load(path)}
    # A missing package, a missing or damaged file, a field that transformers refuses, too little memory.
    except (ImportError, OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:_SHOWN_CHARACTERS]}"}
    Path(_RESULT).write_text(json.dumps(result))


def _load(path: Path) -> str:
    """Say what was loaded."""
    import transformers

    transformers.AutoConfig.from_pretrained(path, **_STRICT)
    loaded = ["config"]
    if has_tokenizer(path):
        transformers.AutoTokenizer.from_pretrained(path, **_STRICT)
        loaded.append("tokenizer")
    if (path / "generation_config.json").is_file():
        transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
        loaded.append("generation settings")
    if Path(_TOKENS).is_file():
        _compute_logits(path)
        loaded.append("weights")
    return f"{', '.join(loaded)}: by transformers {transformers.__version__}, offline, in a process of its own"


@torch.no_grad()
def _compute_logits(path: Path) -> None:
    """Write the logits of the given sequences, fp32; raises ValueError, naming them, if tensors do not fit."""
    from transformers import AutoModelForCausalLM

    # The type of the result depends on output_loading_info.
    auto_class = cast(Any, AutoModelForCausalLM)
    model, report = auto_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **_STRICT)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if names := sorted(str(each) for each in report.get(problem, ()) if not str(each).endswith(DERIVED)):
            raise ValueError(f"{problem.replace('_', ' ')}: {', '.join(names[:_SHOWN_TENSORS])}")
    sequences = load_file(_TOKENS)
    logits = [model(input_ids=sequences[str(number)].unsqueeze(0)).logits[0] for number in range(len(sequences))]
    save_file({"logits": torch.cat(logits)}, _LOGITS)


if __name__ == "__main__":
    _main()

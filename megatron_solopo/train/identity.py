"""What a run keeps from its first step to its last."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_solopo.config import Config
from megatron_solopo.files import sha256_file
from megatron_solopo.model.precision import precision_settings
from megatron_solopo.model_directory import huggingface_directory
from megatron_solopo.train.splits import Splits


def run_identity(config: Config, splits: Splits) -> dict[str, Any]:
    """JSON-able values, by the key that sets each."""
    sections = {"objective": config.objective, "optimizer": config.optimizer}
    keys = {f"{name}.{key}": value for name, section in sections.items() for key, value in section}
    return keys | {
        "model.dtype": config.model.dtype,
        "model.fp8": precision_settings(config.model) or None,
        "model.path (its config.json)": sha256_file(huggingface_directory(config.model.path) / "config.json"),
        "data.path (its content)": splits.manifest.fingerprint,
    }


def check_unchanged(identity: Mapping[str, Any], saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise ValueError naming what differs from the identity that a checkpoint of this run was saved with."""
    changed = [
        f"{key}={value!r} (it was {saved.get(key)!r})" for key, value in identity.items() if saved.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{checkpoint}: a run keeps its objective, optimizer, model, data and reference, but now "
            f"{', '.join(changed)}; restore that, or set run_dir to another directory"
        )

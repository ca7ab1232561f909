"""A PEFT adapter on the disk: `adapter_config.json` and `adapter_model.safetensors`, as peft 0.21 writes them."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_solopo.architecture.adapters import read_lora
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.model_directory import parse_model_json
from megatron_solopo.checkpoint.adapter_checkpoint import ADAPTER_CONFIG
from megatron_solopo.checkpoint.adapter_mapping import adapter_shapes
from megatron_solopo.checkpoint.huggingface_weights import all_finite, not_finite
from megatron_solopo.checkpoint.mapping import Index
from megatron_solopo.config import LoRAConfig
from megatron_solopo.errors import UserError
from megatron_solopo.files import first_few, sha256_file

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapter_fingerprint(path: Path) -> str:
    """Hex SHA-256 of the adapters' bytes. Raises UserError if `path` holds none."""
    file = path / ADAPTER_WEIGHTS
    if not file.is_file():
        raise _missing(file)
    return sha256_file(file)


def _missing(file: Path) -> UserError:
    return UserError(f"{file}: no such file; model.adapter takes a directory that PEFT saved")


class PeftDirectory:
    """The adapters of a directory, checked against the model and the `lora` section.

    Raises UserError naming a missing file, a setting that differs or is not supported, or tensors that are missing,
    unexpected or misshapen.
    """

    def __init__(self, path: Path, architecture: ModelShape, lora: LoRAConfig) -> None:
        self.path = path
        file = path / ADAPTER_CONFIG
        if not file.is_file():
            raise _missing(file)
        self._check_settings(read_lora(parse_model_json(file.read_bytes(), file), file), lora)
        try:
            with safe_open(path / ADAPTER_WEIGHTS, "pt") as weights:
                found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise _missing(path / ADAPTER_WEIGHTS) from None
        except SafetensorError as error:
            raise UserError(f"{path / ADAPTER_WEIGHTS}: cannot be read: {error}") from error
        expected = adapter_shapes(architecture, lora)
        for what, names in (
            ("missing", expected.keys() - found.keys()),
            ("unexpected", found.keys() - expected.keys()),
            ("misshapen", {name for name in expected.keys() & found.keys() if expected[name] != found[name]}),
        ):
            if names:
                raise UserError(
                    f"{path / ADAPTER_WEIGHTS}: does not fit the model and lora.target_modules: {len(names)} {what} "
                    f"({first_few(sorted(names))})"
                )

    def _check_settings(self, stored: LoRAConfig, lora: LoRAConfig) -> None:
        for name in ("rank", "alpha", "use_rslora"):
            found, wanted = getattr(stored, name), getattr(lora, name)
            if found != wanted:
                raise UserError(
                    f"{self.path / ADAPTER_CONFIG}: has {name} {found}, and lora.{name} is {wanted}; set "
                    f"lora.{name}={found}"
                )

    def read(self, name: str, index: Index = (slice(None),)) -> Tensor:
        """A part of a tensor. Raises UserError if a number is not finite."""
        with safe_open(self.path / ADAPTER_WEIGHTS, "pt") as file:
            value: Tensor = file.get_slice(name)[index].float()
        if not all_finite(value):
            raise not_finite(self.path / ADAPTER_WEIGHTS, name)
        return value

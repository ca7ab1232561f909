"""Reads the list of stored tensors of a Megatron distributed checkpoint without running code of it.

The list (`.metadata`) is a pickle that torch's distributed checkpointing writes. It is read by an unpickler that knows
no class but those that belong there.
"""

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import Metadata

from megatron_solopo.model_directory import METADATA

_SAFE_CLASSES = {
    "torch": {"Size", "device"},  # and every dtype
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
}


def read_metadata(checkpoint: Path) -> Metadata:
    """Raises ValueError, naming the file, where it is damaged or holds what has no place in it."""
    file = checkpoint / METADATA
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes()), file).load()
    except _Refused:
        raise
    # A torn pickle raises whatever its bytes lead to.
    except Exception as error:
        raise ValueError(f"{file}: cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise ValueError(f"{file}: is no list of stored tensors")
    return metadata


class _Refused(ValueError):
    """The list of pieces holds what has no place in one."""


class _Unpickler(pickle._Unpickler):
    """Makes instances of the classes above and nothing else. In Python, where each step of it can be replaced."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: io.BytesIO, file: Path) -> None:
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _SAFE_CLASSES.get(module, ()):
            raise _Refused(f"{self._file}: names {module}.{name}, which has no place in a checkpoint; it was not run")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Sets the attributes of an instance, never those of a class or a function, which all others share."""
        target = self.stack[-2]
        if isinstance(target, type) or callable(target):
            raise _Refused(
                f"{self._file}: would change {target!r}, which has no place in a checkpoint; it was not done"
            )
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

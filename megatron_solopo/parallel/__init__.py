"""Process groups, context parallelism, the CPU backend, and Megatron's private surface.

Importing this package adapts `torch.cuda` for a run on the CPU, before megatron is first imported. So every package
that imports megatron imports this one first.
"""

import os
import warnings

from megatron_solopo.parallel import cpu

# Warnings of Megatron-Core's that no user of this package can act on. All others are shown.
_IGNORED_WARNINGS = (
    # Up to six modules of every process say so. `megatron-solopo doctor` reports both libraries.
    r"(Transformer Engine and Apex are|Apex is) not installed\. Falling back to",
    # Megatron's default value of a setting that this package does not use.
    r"full scope is deprecated\. Use empty cuda_graph_scope",
    # The optimizer asks every tensor for its gradient, also those that have none.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    # On GPUs this package sets the variable. On a CPU it has no effect.
    r"When using sequence parallelism it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
)


def _ignore_warnings() -> None:
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message, UserWarning, module=r"megatron\.core\.")


_ignore_warnings()
# Asked whether there is a GPU, torch starts CUDA's driver. Its settings depend on the configuration, which is not read
# yet: `topology.prepare_device` sets them, and Python's later changes reach no driver that runs. So torch asks NVML.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
cpu.adapt_if_needed()

"""Process groups, context parallelism, the CPU backend, and Megatron's private surface.

Importing this package adapts `torch.cuda` for a run on the CPU, before megatron is first imported. So every package
that imports megatron imports this one first.
"""

import warnings

from megatron_solopo.parallel import cpu


def _ignore_missing_libraries() -> None:
    """Silence Megatron's warnings that Apex and Transformer Engine are not installed, and no others.

    Megatron raises them in up to six modules of every process. `megatron-solopo doctor` reports both libraries.
    """
    message = r"(Transformer Engine and Apex are|Apex is) not installed\. Falling back to"
    warnings.filterwarnings("ignore", message, UserWarning, module=r"megatron\.core\.")


_ignore_missing_libraries()
cpu.adapt_if_needed()

"""SoLoPO in other trainers: any Megatron-Core loop (`PreferenceTask`), and Megatron-LM's own `pretrain()`."""

import megatron_solopo.parallel  # noqa: F401  (adapts torch.cuda on a CPU, before megatron is imported)
from megatron_solopo.integrations.task import PreferenceTask

__all__ = ["PreferenceTask"]

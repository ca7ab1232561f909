"""Megatron distributed checkpoints and Hugging Face weights."""

import megatron_solopo.parallel  # noqa: F401  (adapts torch.cuda on a CPU, before megatron is imported)

"""The Megatron-Core GPT model: architecture, layer spec, attention, response-only head."""

import megatron_solopo.parallel  # noqa: F401  (adapts torch.cuda on a CPU, before megatron is imported)

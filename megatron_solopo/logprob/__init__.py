"""Log-probabilities of response tokens and of whole responses."""

import megatron_solopo.parallel  # noqa: F401  (adapts torch.cuda on a CPU, before megatron is imported)

"""Reference pass, training step, trainer and metrics."""

import megatron_solopo.parallel  # noqa: F401  (adapts torch.cuda on a CPU, before megatron is imported)

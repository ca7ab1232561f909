"""What a model has learned: preferences on held-out triplets, answers from long contexts."""

import megatron_solopo.parallel  # noqa: F401  (adapts torch.cuda on a CPU, before megatron is imported)

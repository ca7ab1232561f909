"""What a model does with long contexts: tasks, generation, scores with their uncertainty, pictures."""

import megatron_solopo.parallel  # noqa: F401  (adapts torch.cuda on a CPU, before megatron is imported)

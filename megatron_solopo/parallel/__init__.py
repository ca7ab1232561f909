"""Process groups, context parallelism and the CPU backend.

Importing this room adapts `torch.cuda` for a CPU-only run before megatron is first imported,
so every room that imports megatron imports this one first.
"""

from megatron_solopo.parallel import cpu

cpu.adapt_if_needed()

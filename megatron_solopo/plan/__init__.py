"""Memory, time and cost of a run before it starts: arithmetic, no Megatron (but in `dry_run`)."""

VARIED = ("recompute", "fp8", "offload", "cp_comm")
"""What a search may choose besides the parallel sizes."""

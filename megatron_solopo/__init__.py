"""SoLoPO (short-to-long preference optimization, arXiv 2505.11166) on NVIDIA Megatron-Core."""

__version__ = "0.1.0"

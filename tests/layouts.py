"""Sizes of a layout, by Megatron-Core's names."""

from typing import Any


def tp(size: int, **more: Any) -> dict[str, Any]:
    return {"tensor_model_parallel_size": size, **more}


def pp(size: int, chunks: int | None = None, **more: Any) -> dict[str, Any]:
    return {"pipeline_model_parallel_size": size, "virtual_pipeline_model_parallel_size": chunks, **more}


def ep(size: int, **more: Any) -> dict[str, Any]:
    return {"expert_model_parallel_size": size, **more}


def stages(text: str) -> dict[str, Any]:
    return {"pipeline_model_parallel_layout": text}


def cp(size: int, **more: Any) -> dict[str, Any]:
    return {"context_parallel_size": size, **more}

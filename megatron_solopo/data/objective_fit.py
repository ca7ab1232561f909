"""Whether the rows of prepared data have what an objective reads."""

from megatron_solopo.config import Config
from megatron_solopo.data.prepared import PreparedManifest
from megatron_solopo.errors import UserError


def check_kind(config: Config, manifest: PreparedManifest, source: str = "") -> None:
    """Check that rows of this kind have the responses and the prompts that a run reads.

    Args:
        config: of these rows, so `data.path` is set.
        source: name of these rows in `data.sources`; "": the run reads `data.path` alone.

    Raises UserError for instructions unless the objective is sft, and for pairs if two contexts are read.
    """
    path, name = config.data.directory, config.objective.name
    objective = f"its objective {name}" if source else f"objective.name={name}"
    if manifest.kind == "instruction" and name != "sft":
        raise UserError(
            f"{path}: holds instructions (prompt, completion), but {objective} compares two responses; "
            f"{_set_objective('sft', source)}"
        )
    if manifest.kind == "pair" and len(config.contexts_read) == 2:
        needing, remedy = objective, _set_objective("short_po", source)
        if name != "solopo":  # The policy reads one context. The reference reads the other.
            needing = "reference.context=short"
            # All sources share the reference's context, and each has an objective of its own.
            remedy = remedy if source else "set reference.context=null"
        raise UserError(
            f"{path}: holds plain pairs (prompt, chosen, rejected), but {needing} needs "
            f"prompt_short and prompt_long; prepare triplets, or {remedy}"
        )


def _set_objective(name: str, source: str) -> str:
    return f"set `objective: {name}` of the source {source} in data.sources" if source else f"set objective.name={name}"

"""The sequences of a triplet, by name.

A role is the context that a response is read in and the response that the sequence ends with: `short_chosen`.
"""

from megatron_solopo.config import ObjectiveConfig

ROLES = ("short_chosen", "short_rejected", "long_chosen", "long_rejected")


def context_and_response(role: str) -> tuple[str, str]:
    """`long_chosen` -> (`long`, `chosen`)."""
    assert role in ROLES, f"role {role!r} is none of {ROLES}"
    context, response = role.split("_")
    return context, response


def required_roles(config: ObjectiveConfig) -> tuple[str, ...]:
    """The sequences of a triplet that the objective reads: its pair (chosen, rejected), then what is aligned to it."""
    if config.name == "long_po":
        return ROLES[2:]
    if config.name == "short_po":
        return ROLES[:2]
    return ROLES if config.align == "both" else ROLES[:3]

"""What `moe.replay` does to the gap between short and long contexts, on tiny random models.

    python -m tools.benchmarks.route_replay

The gap is that of one answer's log-probabilities per token, over 64 triplets of random tokens. Its noise is how far
bfloat16 weights and activations move it from float32, which also sends tokens to other experts.
"""

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from torch import Tensor

from megatron_solopo.config import Role
from megatron_solopo.data.packing import build_pack
from megatron_solopo.parallel import topology
from tests.parity.layouts import Layout, live_reference, make_config, tokenized
from tests.tiny_models import VOCAB_SIZE, make_model
from tools.reporting import environment, table

_TRIPLETS, _SHORT, _LONG, _ANSWER = 64, 16, 128, 16
_FAMILIES = ("qwen3_moe", "mixtral")


@click.command(help=__doc__)
def main() -> None:
    """Print the table."""
    click.echo("\n".join(f"{name}: {value}" for name, value in environment().items()) + "\n")
    rows = []
    with TemporaryDirectory() as folder:
        for family in _FAMILIES:
            path = make_model(Path(folder) / family, family)
            for replay in (None, "short"):
                exact = gaps(path, "float32", replay)
                noise = gaps(path, "bfloat16", replay) - exact
                rows.append([family, str(replay), f"{float(exact.std()):.3f}", f"{float(noise.std()):.3f}"])
    click.echo(table(["model_type", "moe.replay", "gap, standard deviation", "its noise"], rows))


def gaps(path: Path, dtype: str, replay: str | None) -> Tensor:
    """fp32 [triplets]: log-probability per token behind the short context minus that behind the long one."""
    layout = Layout("one", model={"dtype": dtype}, moe={"replay": replay})
    config = make_config(path, {"name": "solopo", "loss_type": "dpo"}, layout)
    groups, roles = topology.initialize(config.parallel, seed=1), config.objective.roles.all
    try:
        packs = [
            build_pack([tokenized(row, number)], roles, 1, share_prompts=False) for number, row in enumerate(triplets())
        ]
        found = live_reference(config, path, groups, [packs], _TRIPLETS)
    finally:
        topology.destroy(groups)
    logps = dict(zip(found.roles, found.logps.unbind(dim=1), strict=True))
    return (logps[Role.SHORT_CHOSEN] - logps[Role.LONG_CHOSEN]) / _ANSWER


def triplets() -> list[dict[str, object]]:
    """Random tokens, the same each time."""
    generator = random.Random(0)
    lengths = {"prompt_short": _SHORT, "prompt_long": _LONG, "chosen": _ANSWER, "rejected": _ANSWER}
    return [
        {"id": str(number)}
        | {name: [generator.randrange(VOCAB_SIZE) for _ in range(length)] for name, length in lengths.items()}
        for number in range(_TRIPLETS)
    ]


if __name__ == "__main__":
    main()

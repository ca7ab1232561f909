"""Error of the output weight's gradient in bfloat16, by the number of chunks that it is summed over.

    python -m tools.benchmarks.head_precision

The same random rows go through the head in one chunk and in several. "Summed in fp32" is the head that trains.
"Summed in bfloat16" lets autograd add the chunks' gradients, as a plain chunked head does. The error is the norm of the
difference to float64, over the norm of the gradient.
"""

import click
import torch
from torch import Tensor

from megatron_solopo.config import ParallelConfig
from megatron_solopo.model.head import label_logprobs
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.topology import Topology
from tools.reporting import environment, table

_ROWS, _HIDDEN, _VOCABULARY = 4096, 256, 4096


@click.command(help=__doc__)
def main() -> None:
    """Print the table."""
    click.echo("\n".join(f"{name}: {value}" for name, value in environment().items()) + "\n")
    groups = topology.initialize(ParallelConfig(), seed=1)
    try:
        rows = [[f"{chunk:,}", *(f"{error:.2%}" for error in errors(chunk, groups))] for chunk in (4096, 1024, 256, 64)]
    finally:
        topology.destroy(groups)
    click.echo(table(["rows per chunk", "summed in fp32", "summed in bfloat16"], rows))


def errors(chunk: int, groups: Topology) -> tuple[float, float]:
    """Relative error of the gradient when it is summed in fp32, and when autograd sums it in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_ROWS, _HIDDEN, generator=generator).bfloat16()
    weight = (torch.randn(_VOCABULARY, _HIDDEN, generator=generator) / _HIDDEN**0.5).bfloat16()
    labels = torch.randint(_VOCABULARY, (_ROWS,), generator=generator)
    exact = weight.double().requires_grad_()
    (hidden.double() @ exact.t()).log_softmax(dim=-1).gather(1, labels[:, None]).sum().backward()

    def gradient(split: int) -> Tensor:
        parameter = torch.nn.Parameter(weight.clone())
        for rows, wanted in zip(torch.split(hidden, split), torch.split(labels, split), strict=True):
            value = label_logprobs(
                rows,
                parameter,
                wanted,
                vocab_size=_VOCABULARY,
                chunk_tokens=chunk,
                tensor_group=groups.tensor_group,
                reduce_hidden_gradient=False,
            )
            torch.autograd.backward(value.sum())
        assert parameter.grad is not None
        return parameter.grad

    def error(found: Tensor) -> float:
        assert exact.grad is not None
        return float((found.double() - exact.grad).norm() / exact.grad.norm())

    return error(gradient(_ROWS)), error(gradient(chunk))


if __name__ == "__main__":
    main()

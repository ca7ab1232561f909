"""`python -m megatron_solopo`, and what `torchrun -m megatron_solopo` starts."""

from megatron_solopo.cli import main

if __name__ == "__main__":
    main()

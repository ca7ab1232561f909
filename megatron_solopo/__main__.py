"""Run `python -m megatron_solopo`, which is also what `torchrun -m megatron_solopo` starts."""

from megatron_solopo.cli.main import main

if __name__ == "__main__":
    main()

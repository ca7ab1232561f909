"""`python -m megatron_solopo`, and what `torchrun -m megatron_solopo` starts."""

import atexit
import os
import sys

from megatron_solopo.cli.main import main


def leave(code: str | int | None) -> None:
    """Exit as `sys.exit(code)` does, all but taking the interpreter apart.

    Threads of torch's process groups may still run then, and the first that needs the interpreter aborts the process:
    a run that was done, or had saved and stopped, would end with SIGABRT.
    """
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(code, str) else code or 0)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as error:
        leave(error.code)
    leave(0)

"""Entry point of `python -m megatron_solopo` and `torchrun -m megatron_solopo`."""

import atexit
import os
import sys

from megatron_solopo.cli.main import main


def leave(code: str | int | None) -> None:
    """Exit as `sys.exit(code)` does, but without the end of the interpreter.

    Threads of torch's process groups may still run at that time. The first one that needs the interpreter aborts the
    process, so that a run that succeeded, or was stopped and saved, would end with SIGABRT.
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

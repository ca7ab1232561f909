"""Python runs this first in every process, subprocesses too, whose PYTHONPATH has this folder."""

import os
import sys

if "COVERAGE_PROCESS_START" in os.environ:
    import coverage

    coverage.process_startup()

# multiprocessing's helper needs no GPU, and importing all this takes seconds. A run on the CPU has no GPU's code.
is_helper = any("resource_tracker" in argument for argument in sys.orig_argv)
if not is_helper and os.environ.get("MEGATRON_SOLOPO_DEVICE") != "cpu":
    from tests.emulated_gpu.install import install

    install()

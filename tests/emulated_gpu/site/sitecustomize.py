"""Python runs this first in every process, subprocesses too, whose PYTHONPATH has this folder."""

import sys

# multiprocessing's helper needs no GPU, and importing all this takes seconds.
if not any("resource_tracker" in argument for argument in sys.orig_argv):
    from tests.emulated_gpu.install import install

    install()

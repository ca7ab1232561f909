"""What ranks import, for the server whose forks they are: imported once, not by every rank of every launch.

Nothing here may start a thread that a fork would miss. pyarrow's jemalloc has one, and starts it again in each fork.
"""

import gc

import datasets  # noqa: F401
import hypothesis  # noqa: F401
import matplotlib.figure  # noqa: F401
import pytest  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401

import megatron_solopo.checkpoint.load
import megatron_solopo.train.trainer  # noqa: F401
import tests.prepared
import tests.tiny_models  # noqa: F401

# No rank searches the server's objects for garbage, and so none copies their pages.
gc.collect()
gc.freeze()

"""These tests run in processes that `site/sitecustomize.py` has prepared: `make test-emulated-gpu`."""

import os
import sys

collect_ignore_glob = [] if "transformer_engine_torch" in sys.modules else ["test_*.py"]
if os.environ.get("EMULATED_GPU") != "blackwell":
    collect_ignore_glob.append("test_blackwell.py")

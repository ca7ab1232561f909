"""These tests run in processes that `site/sitecustomize.py` has prepared: `make test-emulated-gpu`."""

import sys

collect_ignore_glob = [] if "transformer_engine_torch" in sys.modules else ["test_*.py"]

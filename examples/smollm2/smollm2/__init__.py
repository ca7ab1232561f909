"""What the scripts of this example share."""

import sys
from pathlib import Path

# Scripts are started by their path, so Python does not look for `tools` in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

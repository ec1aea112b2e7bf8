"""Puts this folder on the path, where its tables are."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

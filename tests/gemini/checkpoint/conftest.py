"""Lets the tests of this folder import ``checkpoint_cases``: pytest's importlib mode leaves ``sys.path`` alone."""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
logging.getLogger("transformers").setLevel(logging.ERROR)

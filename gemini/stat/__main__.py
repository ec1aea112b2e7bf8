"""``python -m gemini.stat``."""

import sys

from gemini.stat.cli import main

sys.exit(main())

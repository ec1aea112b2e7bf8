"""``python -m gemini.train``."""

import sys

from gemini.train.cli import main

if __name__ == "__main__":  # a DataLoader's or torchrun's spawned children import this file, too
    sys.exit(main())

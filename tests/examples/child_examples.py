"""One rank that runs examples one after the other, as if each had a process of its own: imports are paid once.

The argument is a JSON list of runs, each a list of the script and its arguments. Rank 0 writes a line before each.
"""

import json
import os
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

sys.path.insert(0, str(EXAMPLES))
for number, (script, *arguments) in enumerate(json.loads(sys.argv[1])):
    if os.environ["RANK"] == "0":
        print(f"== run {number}", file=sys.stderr, flush=True)
    sys.argv = [script, *arguments]
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")

"""Run uses and print a line of JSON for each: lines of ``name<tab>placement`` come in on standard input.

A use that crashes or hangs ends this process only; see `report.py`.
"""

import json
import sys
import tempfile
import warnings

import torch

from outside.catalogue import USES
from outside.harness import PLACEMENTS, judge


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        name, placement = line.rstrip("\n").split("\t")
        with tempfile.TemporaryDirectory() as folder:
            verdict = judge(USES[name], PLACEMENTS[placement], folder)
        print(json.dumps({"kind": verdict.kind, "text": verdict.text}), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""Run uses and print a line of JSON for each: lines of ``name<tab>placement`` come in on standard input.

A use that crashes or hangs ends this process only; see `report.py`.
"""

import json
import sys
import tempfile
import warnings

import torch
from outside.catalogue import USES
from outside.harness import PLACEMENTS, Verdict


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        name, placement = line.rstrip("\n").split("\t")
        with tempfile.TemporaryDirectory() as folder:
            try:
                verdict = USES[name].judge(PLACEMENTS[placement], folder)
            except Exception as error:  # before the use, or in plain PyTorch
                verdict = Verdict("BROKEN", f"{type(error).__name__}: {error}")
        print(json.dumps({"kind": verdict.kind, "text": verdict.text}), file=answers, flush=True)


if __name__ == "__main__":
    main()

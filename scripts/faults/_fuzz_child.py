"""The child of fuzz.py: ``_fuzz_child.py TARGET FOLDER SEED SECONDS FAILURES LIMIT_MIB`` prints a line an input.

The input that is being judged is ``current`` in the folder, so that it can be had when this process is gone.
"""

import importlib
import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path


def main() -> None:
    target, folder, seed, seconds, failures, limit_mib = sys.argv[1:]
    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(1), "w", buffering=1)
    place = Path(folder).resolve()
    os.chdir(place)
    os.environ["XDG_STATE_HOME"] = str(place / "state")
    current = place / "current"
    judge = importlib.import_module(f"_fuzz_{target}").Judge(place, current, random.Random(f"{target} {seed}"))
    limit = int(limit_mib) << 20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    end, number = time.monotonic() + float(seconds), 0
    while time.monotonic() < end:
        what, outcome, is_bad = judge.try_one()
        number += 1
        if is_bad:
            keep(current, Path(failures) / f"{target}-{seed}-{number}", f"{what}\n{outcome}\n")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(json.dumps({"what": what, "outcome": outcome, "is_bad": is_bad, "peak_mib": peak}), file=out)
    out.flush()
    os._exit(0)  # whatever threads still do


def keep(current: Path, kept: Path, text: str) -> None:
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "outcome.txt").write_text(text, errors="backslashreplace")
    if current.is_dir():
        shutil.copytree(current, kept / "input", symlinks=True, dirs_exist_ok=True)
    elif current.exists():
        shutil.copy(current, kept / "input")


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # threads of the judged must not have it look like a hang

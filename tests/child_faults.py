"""Each operation of one kind fails once: a line of JSON for each, on standard output.

    python child_faults.py SETTING WHAT SITE FIRST STEP SECONDS

A step that takes more than SECONDS ends the process, with the stacks of all threads on standard error.
"""

import faulthandler
import gc
import json
import os
import sys
import tempfile
import time

import torch
from fault_sites import ALLOCATIONS, DISK
from faulty_steps import SETTINGS, Broken, run_boosts, run_first_steps, run_steps

RUNS = {"step": run_steps, "first step": run_first_steps, "boost": run_boosts}


def main() -> None:
    setting, what, site, first, step, seconds = sys.argv[1:]
    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp(prefix="faults-"))
    gc.collect()
    gc.freeze()
    begin = time.monotonic()
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    for at, result in RUNS[what](SETTINGS[setting], {**ALLOCATIONS, **DISK}[site], int(first), int(step)):
        line = {"at": at, "seconds": round(time.monotonic() - begin, 3)}
        if isinstance(result, Broken):
            line["broken"] = str(result)[-3000:]
        else:
            line["injected"] = result.is_injected
            line["happened"] = result.happened
            line["torn"] = result.is_torn
            line["errors"] = [error.text[:300] for error in result.errors]
            line["untyped"] = [error.trace[-2000:] for error in result.errors if error.is_untyped]
        print(json.dumps(line), flush=True)
        begin = time.monotonic()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback_later(float(seconds), exit=True)
    faulthandler.cancel_dump_traceback_later()
    os._exit(0)  # what is left open says nothing of the faults


if __name__ == "__main__":
    main()

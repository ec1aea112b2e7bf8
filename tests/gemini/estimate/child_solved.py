"""Run by test_estimate_solved.py: trials of training, each under a cap, one JSON line for what became of each.

    python child_solved.py '{"spec": ..., "fields": {...}, "warm": {...}, "precision": ..., "trials": [
        {"batch": ..., "length": ..., "cap_bytes": ..., "checkpointing": ..., "plugin": {...}}, ...]}'

``cap_bytes`` is how much RLIMIT_DATA leaves beyond what the warm process has; null for no cap.
"""

import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

from gemini.process_wide import return_freed_memory

return_freed_memory()  # before anything large is imported: holes that malloc keeps would be room beyond the cap

from child_measured import train  # noqa: E402

from gemini.errors import is_out_of_memory  # noqa: E402
from gemini.estimate.subject import Subject, find_subject  # noqa: E402

KEEPS = {"activation_policy": "keep"}
"""What the command estimates; without a policy, a training that is short keeps less and goes on."""


def main() -> None:
    asked = json.loads(sys.argv[1])
    precision = asked["precision"]
    # Libraries, kernels and thread pools first, so that the caps are about the training alone.
    warm = find_subject(asked["spec"], {**asked["fields"], **asked["warm"]})
    train(warm, 2, 32, False, 2, precision=precision, **asked.get("warm_plugin", {}))
    subject = find_subject(asked["spec"], asked["fields"])
    for trial in asked["trials"]:
        print(json.dumps(attempt(subject, precision, trial)), flush=True)


def attempt(subject: Subject, precision: str, trial: dict[str, Any]) -> dict[str, Any]:
    gc.collect()
    return_freed_memory()
    if trial["cap_bytes"] is not None:
        limit = _data_bytes() + trial["cap_bytes"]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        model = train(
            subject,
            trial["batch"],
            trial["length"],
            bool(trial.get("checkpointing")),
            3,
            precision=precision,
            **{**KEEPS, **trial["plugin"]},
        )
        return {"error": None, "stats": model.memory_stats()}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData"))


if __name__ == "__main__":
    main()

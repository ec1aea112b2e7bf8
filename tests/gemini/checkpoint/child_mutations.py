"""Prints how many mutated files came to what, under a limit of memory: ``child_mutations.py FOLDER COUNT SEED``."""

import os
import resource
import sys
import warnings
from collections import Counter
from pathlib import Path

for name in (".", "../.."):
    sys.path.insert(0, str(Path(__file__).parent / name))

from mutated_loads import bad, outcomes  # noqa: E402

if __name__ == "__main__":
    folder, count, seed = Path(sys.argv[1]).absolute(), int(sys.argv[2]), int(sys.argv[3])
    os.chdir(folder)
    warnings.simplefilter("ignore")
    limit = int(sys.argv[4]) << 20 if len(sys.argv) > 4 else 3 << 30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    found = outcomes(folder, count, seed)
    kinds: Counter[str] = Counter()
    for (what, outcome), times in found.items():
        kinds[f"{what.partition(':')[0]}: {outcome.partition(':')[0]}"] += times
    for kind, times in sorted(kinds.items()):
        print(f"{times:6d}  {kind}")
    print(f"{sum(kinds.values()):6d}  in all")
    print("\n".join(bad(found)))
    sys.exit(bool(bad(found)))

"""One part of `gpu.py` in a process of its own: python gpu_part.py '{"part": "bandwidth", "device": "auto", ...}'.

Each answer is a line of JSON on the real stdout, written at once, so that a part that is ended has told what it has
found until then. What libraries print goes to stderr.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_bandwidth
import gpu_peers
import gpu_step
import gpu_trace
from gpu_device import Device
from gpu_settings import FULL, REDUCED, Settings, Size


def answers(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the part finds."""
    settings = replace(REDUCED if asked["reduced"] else FULL, **asked.get("settings", {}))
    device = Device(asked["device"])
    size = next((each for each in settings.sizes if each.name == asked.get("size")), settings.sizes[0])
    if asked["part"] == "bandwidth":
        yield device.describe()
        yield from gpu_bandwidth.run(device, settings)
    elif asked["part"] == "step":
        yield from gpu_step.run(device, settings, size, asked["placement"])
    elif asked["part"] == "peer":
        yield from gpu_peers.run(device, settings, size, asked["peer"])
    elif asked["part"] == "largest":
        yield from _largest(device, settings, asked["layers"])
    elif asked["part"] == "trace":
        yield from gpu_trace.run(device, settings, size, Path(asked["file"]))
    else:
        raise ValueError(f"no part {asked['part']!r}")


def _largest(device: Device, settings: Settings, layers: int) -> Iterator[dict[str, Any]]:
    """Says whether a model with this number of layers trains, on all memory that there is."""
    size = Size(name=f"{layers} layers", layers=layers, hidden=settings.widest)
    few = replace(settings, tokens=(settings.tokens[0],), steps=1)
    config = gpu_step.config_of(size, few)
    step, model = gpu_step.managed(config, {})
    yield {"layers": layers, **next(gpu_step.timed(device, few, step, config.parameter_count(), model))} | {
        "parameters": config.parameter_count()
    }


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        for answer in answers(json.loads(sys.argv[1])):
            print(json.dumps(answer), file=out, flush=True)
    except BaseException as error:
        traceback.print_exc()
        told = str(error).strip() or "no message"
        print(json.dumps({"error": f"{type(error).__name__}: {told}"[:600]}), file=out, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""The stacks of the threads that a training starts."""

import threading
from pathlib import Path

import pytest
from loop import SMALL, batch, build

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import workers
from gemini.chunk.disk_tuning import DEPTHS
from gemini.memory.thread_stacks import stack_bytes
from gemini.nn.optimizer import HybridAdam
from gemini.nn.optimizer.kernels.kernel_pool import default_pool
from gemini.process_wide import IO_STACK_BYTES, default_stack_bytes


@pytest.mark.parametrize("uses_disk", [False, True])
def test_the_stacks_of_all_threads_of_a_training_are_counted(
    uses_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: list[int] = []
    start = threading.Thread.start

    def counted(thread: threading.Thread) -> None:
        stacks.append(threading.stack_size(0) or default_stack_bytes())  # which also sets it
        threading.stack_size(0 if stacks[-1] == default_stack_bytes() else stacks[-1])
        start(thread)

    default_pool()  # of the process, like those of libraries
    monkeypatch.setattr(threading.Thread, "start", counted)
    monkeypatch.setattr(workers, "_closer", workers._Closer())  # as in a new process
    limits = {"host_memory": "300KiB", "offload_dir": tmp_path / "disk", **SMALL} if uses_disk else {}
    model = build()
    booster = Booster(plugin=GeminiPlugin(telemetry=tmp_path / "run", **limits))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    for number in range(2):
        booster.backward(model(batch(number)).float().square().mean(), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    counted_bytes = stack_bytes(uses_disk)
    beside = (max(DEPTHS) - 1) * IO_STACK_BYTES if uses_disk else 0  # so small a tier has one request at a time
    assert sum(stacks) == counted_bytes - beside

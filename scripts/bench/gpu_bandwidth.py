"""Kernels and the link: bytes a second of copies on the device and between it and RAM, and of an update of Adam."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_device import Device
from gpu_settings import Settings

from gemini.nn.optimizer.kernels.arithmetic import AdamHyper, scalars
from gemini.nn.optimizer.kernels.update import adam_update

HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled=True, bias_correction=True)
FORMS = {"fp32": 28, "split": 26}
"""Bytes an element that an update with a bf16 gradient and a bf16 copy reads and writes, by the form of masters."""


def run(device: Device, settings: Settings) -> Iterator[dict[str, Any]]:
    """GB/s of each; a kind that fails tells why, and the others go on."""
    kinds: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "copy on the device": lambda: _copy_on_device(device, settings),
        **{
            f"Adam on the device, {form}": lambda form=form: _adam(device.device, form, device, settings)
            for form in FORMS
        },
        **{
            f"Adam in RAM, {form}": lambda form=form: _adam(torch.device("cpu"), form, device, settings)
            for form in FORMS
        },
    }
    if device.is_accelerator:
        kinds |= {
            f"link, {'page-locked' if pin else 'pageable'}": lambda pin=pin: _link(device, settings, pin)
            for pin in (True, False)
        }
    for what, measure in kinds.items():
        try:
            for found in measure():
                yield {"what": what, **found}
        except Exception as error:
            yield {"what": what, "error": f"{type(error).__name__}: {error}"[:300]}


def _copy_on_device(device: Device, settings: Settings) -> Iterator[dict[str, Any]]:
    source = torch.zeros(settings.copy_bytes, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    yield {"gb_per_second": 2 * source.nbytes / device.seconds(lambda: target.copy_(source)) / 1e9}


def _adam(where: torch.device, form: str, device: Device, settings: Settings) -> Iterator[dict[str, Any]]:
    numel = settings.numel
    gradient = torch.full((numel,), 1e-3, dtype=torch.bfloat16, device=where)
    moments = [torch.zeros(numel, device=where) for _ in range(2)]
    at_step = scalars(HYPER, 10)
    copy = torch.zeros(numel, dtype=torch.bfloat16, device=where)
    if form == "fp32":
        master = torch.zeros(numel, device=where)
        took = device.seconds(lambda: adam_update("fp32", (master, *moments), gradient, at_step, copy))
    else:
        low = torch.zeros(numel, dtype=torch.int16, device=where)
        took = device.seconds(lambda: adam_update("split", (copy, low, *moments), gradient, at_step))
    yield {"gb_per_second": FORMS[form] * numel / took / 1e9, "ns_per_parameter": 1e9 * took / numel}


def _link(device: Device, settings: Settings, pin: bool) -> Iterator[dict[str, Any]]:
    """Down, up, and both at once in two streams."""
    nbytes = settings.copy_bytes
    up, down = (torch.zeros(nbytes, dtype=torch.uint8, device=device.device) for _ in range(2))
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pin) for _ in range(2))
    streams = [torch.Stream(device.device) for _ in range(2)]

    def both() -> None:
        with _in(streams[0]):
            up.copy_(source, non_blocking=True)
        with _in(streams[1]):
            target.copy_(down, non_blocking=True)

    ways: dict[str, Callable[[], object]] = {
        "to the device": lambda: up.copy_(source, non_blocking=True),
        "to RAM": lambda: target.copy_(down, non_blocking=True),
        "both at once": both,
    }
    for way, action in ways.items():
        moved = nbytes * (2 if way == "both at once" else 1)
        yield {"way": way, "gb_per_second": moved / device.seconds(action) / 1e9}


@contextmanager
def _in(stream: torch.Stream) -> Iterator[None]:
    before = torch.accelerator.current_stream()
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)

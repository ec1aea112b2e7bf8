"""The simulated device in this process: ``torch.device("sim")``.

The name of a device that is not torch's own is global to the process, so that only a process that has no other use
of torch may call `register`. See docs/simulated-device.md.
"""

import ctypes
import types
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from device_build import library

NAME = "sim"
GIB = 1 << 30

_FOR_EACH_DEVICE = ("convolution", "convolution_backward")
"""Operators with an implementation for all devices that chooses among those that torch knows by name."""


class SimulatedDevice:
    """What a test may do to the device beside using it."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        compiled.sim_pending.restype = ctypes.c_size_t
        self._compiled = compiled
        self.capacity_bytes = 4 * GIB

    def seed(self, seed: int, eager: float = 0.3, lazy: float = 0.5) -> None:
        """Choose the order in which streams go on.

        Parameters
        ----------
        eager
            The chance that putting in a kernel lets the device go on a little; 0 for a device that is always late.
        lazy
            The chance that a wait runs only what it needs.
        """
        self._compiled.sim_seed(ctypes.c_uint64(seed), ctypes.c_double(eager), ctypes.c_double(lazy))

    def set_capacity(self, nbytes: int) -> None:
        """Bytes that the allocator may have, in use and kept for reuse together."""
        self._compiled.sim_set_capacity(ctypes.c_size_t(nbytes))
        self.capacity_bytes = nbytes

    @property
    def pending(self) -> int:
        """Kernels, marks and waits that have been put into streams and not been run."""
        return int(self._compiled.sim_pending())


def register() -> SimulatedDevice:
    """Make the device known to torch, as an accelerator. Once per process.

    Raises
    ------
    Unavailable
        If it cannot be built here.
    """
    compiled = ctypes.CDLL(str(library()))
    compiled.sim_register()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    for name in (*_FOR_EACH_DEVICE, *_taken_apart()):
        compiled.sim_use_kernel_of_cpu(name.encode())
    return SimulatedDevice(compiled)


def _module() -> types.ModuleType:
    """What torch asks of ``torch.sim``."""
    module = types.ModuleType(f"torch.{NAME}")
    members = {
        "device": lambda device: nullcontext(),  # a context in which it is the current one: there is no other
        "current_stream": lambda device=None: torch.accelerator.current_stream(),
        "stream": lambda stream: stream,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: torch.accelerator.synchronize(),
        "manual_seed": lambda seed: None,  # there is one generator, the CPU's
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=0: torch.get_rng_state(),
        "set_rng_state": lambda state, device=0: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "_is_in_bad_fork": lambda: False,
    }
    vars(module).update(members)
    return module


def _taken_apart() -> Iterator[str]:
    """Operators that have a kernel of the CPU and would be made of others elsewhere: the bits would differ."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("aten::") or has_kernel(name, "PrivateUse1") or not has_kernel(name, "CPU"):
            continue
        if not any(has_kernel(name, f"Composite{kind}Autograd") for kind in ("Implicit", "Explicit")):
            continue
        schema = torch._C._get_schema(*(name.split(".") if "." in name else (name, "")))
        if not any(result.alias_info and not result.alias_info.is_write for result in schema.returns):
            yield name.removeprefix("aten::")

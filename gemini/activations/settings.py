"""Settings of torch that belong to the whole process, and that a forward's numbers may depend on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import backends

from ..torch_private import attention_order, set_attention_order

_ATTRIBUTES: tuple[tuple[Any, str], ...] = (
    *((backends.mkldnn, name) for name in ("enabled", "deterministic")),
    *((backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
    *((backends.cuda.matmul, f"allow_{name}_reduced_precision_reduction") for name in ("fp16", "bf16")),
    *((backends.opt_einsum, name) for name in ("enabled", "strategy")),
    *(
        (where, "fp32_precision")
        for backend in (backends.mkldnn, backends.cudnn, backends.cuda)
        for where in (getattr(backend, part, None) for part in ("matmul", "conv", "rnn"))
        if hasattr(where, "fp32_precision")
    ),
)
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")
"""Kernels of attention, which ``torch.nn.attention.sdpa_kernel`` turns on and off."""


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_determinism(state: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])


_PAIRS: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (_determinism, _set_determinism),
    (backends.mha.get_fastpath_enabled, backends.mha.set_fastpath_enabled),
    (attention_order, set_attention_order),
    *(
        (getattr(backends.cuda, f"{name}_sdp_enabled"), getattr(backends.cuda, f"enable_{name}_sdp"))
        for name in _ATTENTION
    ),
    *((partial(getattr, *where), partial(setattr, *where)) for where in _ATTRIBUTES),
)
"""What tells a setting, and what sets it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All of them, at one moment."""

    values: tuple[Any, ...]

    @classmethod
    def now(cls) -> "Settings":
        """Those of this moment."""
        return cls(tuple(tell() for tell, _ in _PAIRS))

    def put_back(self) -> None:
        """Have all be so again. What is so already is not touched."""
        for (tell, put), value in zip(_PAIRS, self.values, strict=True):
            if tell() != value:
                put(value)

"""Non-model data without allocating any: a forward and backward on fake tensors, counted storage by storage.

The peak of a model of identical layers grows by the same amount with each of them, so two and three layers are run and
the rest is added. Fake tensors and not ``meta``: on ``meta`` attention takes another path, with half as much again of
activations (measured).
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gemini.estimate.subject import Subject, loss_of

from ..torch_private import FakeTensorMode, TorchDispatchMode, own_modules, own_parameters, storage_key, tree_leaves

SCRATCH_BYTES = 3 << 20
"""A thread: what kernels keep for themselves and no operation shows, most of it oneDNN's code (0.6 MiB for each shape
of a product). Measured: 4 to 12 MiB with two threads, over GPT2, Llama, BERT, T5 and Mixtral, with and without
checkpointing."""
SHORT = 2
"""Layers that stay of a list that is cut; one more is run to see what a layer adds."""


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is on, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def leave_out(self, tensors: Sequence[Tensor]) -> None:
        """These are model data: neither they nor views of them count."""
        for tensor in tensors:
            self._sizes[storage_key(tensor.untyped_storage())] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key in self._sizes:
            return
        nbytes = storage.nbytes()
        self._sizes[key] = nbytes
        self.nbytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.nbytes -= self._sizes.pop(key, 0)


class Activations:
    """Peaks of one subject at several batch sizes and sequence lengths; each is measured once.

    Parameters
    ----------
    subject
        What is trained.
    dtype
        The compute dtype.
    checkpointing
        Recompute activations in backward, as transformers' models do it.
    """

    def __init__(self, subject: Subject, dtype: torch.dtype, checkpointing: bool) -> None:
        self._subject = subject
        self._dtype = dtype
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[tuple[int, int], int] = {}
        with self._mode:
            self._model = subject.build()
            _convert(self._model, dtype)
            self._model.train()
            if checkpointing:
                _checkpoint(self._model)
            for parameter in self._model.parameters():
                # As in managed training: a gradient goes to its chunk at once.
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
        self._lists = repeated_layers(self._model)

    def peak_bytes(self, batch_size: int, seq_len: int) -> int:
        """The most that activations and temporaries take at once in forward and backward, kernels' scratch included."""
        return self.tracked_bytes(batch_size, seq_len) + SCRATCH_BYTES * torch.get_num_threads()

    def tracked_bytes(self, batch_size: int, seq_len: int) -> int:
        """What operations make, at its peak."""
        key = (batch_size, seq_len)
        if key not in self._known:
            self._known[key] = self._extrapolated(batch_size, seq_len)
        return self._known[key]

    def _extrapolated(self, batch_size: int, seq_len: int) -> int:
        lengths = [len(layers) for layers in self._lists]
        short = [min(SHORT, length) for length in lengths]
        total = base = self._measured(short, batch_size, seq_len)
        for index, length in enumerate(lengths):
            one_more = [count + (i == index) for i, count in enumerate(short)]
            total += (length - SHORT) * max(0, self._measured(one_more, batch_size, seq_len) - base)
        return total

    def _measured(self, lengths: Sequence[int], batch_size: int, seq_len: int) -> int:
        meter = StorageMeter()
        with self._mode, _cut(self._lists, lengths):
            meter.leave_out([*self._model.parameters(), *self._model.buffers()])
            batch = {key: self._cast(value) for key, value in self._subject.batch(batch_size, seq_len).items()}
            for value in batch.values():
                if isinstance(value, torch.Tensor):
                    meter._see(value)
            with meter:
                loss_of(self._model(**batch)).backward()
        return meter.peak_bytes

    def _cast(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def repeated_layers(model: nn.Module) -> list[nn.ModuleList]:
    """Lists of more than three layers that are alike, outermost ones only. The first may differ, as T5's does."""
    found: list[nn.ModuleList] = []
    inner: set[nn.Module] = set()
    for module in model.modules():
        if module in inner or not isinstance(module, nn.ModuleList) or len(module) <= SHORT + 1:
            continue
        kinds = {_kind(layer) for layer in list(module)[1:]}
        if len(kinds) == 1 and next(iter(kinds))[1]:
            found.append(module)
            inner.update(module.modules())
    return found


def _kind(layer: nn.Module) -> tuple[str, tuple[Any, ...]]:
    return type(layer).__qualname__, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())


@contextmanager
def _cut(lists: Sequence[nn.ModuleList], lengths: Sequence[int]) -> Iterator[None]:
    """Shorten each list to its number in ``lengths`` for as long as the context lasts."""
    cut = [own_modules(layers) for layers in lists]
    whole = [dict(modules) for modules in cut]
    try:
        for modules, length in zip(cut, lengths, strict=True):
            for name in list(modules)[length:]:
                del modules[name]
        yield
    finally:
        for modules, before in zip(cut, whole, strict=True):
            modules.update(before)


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to the compute dtype, as full copies have it; buffers and modules with running statistics stay."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            continue
        for name, parameter in own_parameters(module).items():
            if parameter is None or not parameter.is_floating_point() or parameter.dtype is torch.float64:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            own_parameters(module)[name] = made[id(parameter)]


def _checkpoint(model: nn.Module) -> None:
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        enable = getattr(model, name, None)
        if enable is not None:
            enable()
            return
    raise TypeError(
        f"{type(model).__name__} has no gradient_checkpointing_enable(); have your function build it with checkpointing"
    )


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None

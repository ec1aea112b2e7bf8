"""Non-model data without allocating any: a forward and backward on fake tensors, counted storage by storage.

The peak of a model of identical layers grows by the same amount with each of them, so two and three layers are run and
the rest is added. Fake tensors and not ``meta``: on ``meta`` attention takes another path, with half as much again of
activations (measured).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemini.activations.blocks import blocks_of
from gemini.activations.make import LIMIT_BYTES
from gemini.estimate.subject import Subject, loss_of
from gemini.planning.activation_choice import Choice

from ..torch_private import FakeTensorMode, own_modules, own_parameters
from .storages import SavedAway, StorageMeter

SCRATCH_BYTES = 3 << 20
"""A thread: what kernels keep for themselves and no operation shows, most of it oneDNN's code (0.6 MiB for each shape
of a product). Measured: 4 to 12 MiB with two threads, over GPT2, Llama, BERT, T5 and Mixtral, with and without
checkpointing."""
SHORT = 2
"""Layers that stay of a list that is cut; one more is run to see what a layer adds."""


class Tracked(NamedTuple):
    """Bytes of one step."""

    peak_bytes: int
    """The most that operations have made at once, where they compute."""
    away_bytes: int = 0
    """The most that has left it at once."""

    def plus(self, one_more: "Tracked", count: int) -> "Tracked":
        """With ``count`` more of the layers of which ``one_more`` has one more than this."""
        return Tracked(*(a + count * max(0, b - a) for a, b in zip(self, one_more, strict=True)))


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
    choice
        What becomes of the tensors that each block saves, as `GeminiPlugin`'s ``activation_policy`` has it.
    """

    def __init__(
        self, subject: Subject, dtype: torch.dtype, checkpointing: bool = False, choice: Choice = Choice.KEEP
    ) -> None:
        self._subject = subject
        self._dtype = dtype
        self._choice = choice
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[tuple[int, int], Tracked] = {}
        with self._mode:
            self._model = subject.build()
            _convert(self._model, dtype)
            self._model.train()
            if checkpointing:
                _checkpoint(self._model)
            if choice.recomputes:
                _run_again(blocks_of(self._model))
            for parameter in self._model.parameters():
                # As in managed training: a gradient goes to its chunk at once.
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
        self._lists = repeated_layers(self._model)

    def peak_bytes(self, batch_size: int, seq_len: int) -> int:
        """The most that activations and temporaries take at once in forward and backward, kernels' scratch included."""
        scratch = SCRATCH_BYTES * torch.get_num_threads()
        on_their_way = 2 * LIMIT_BYTES if self._choice.moves else 0
        tracked = self._tracked(batch_size, seq_len)
        return tracked.peak_bytes + min(on_their_way, tracked.away_bytes) + scratch

    def away_bytes(self, batch_size: int, seq_len: int) -> int:
        """The most that is on a tier below at once."""
        return self._tracked(batch_size, seq_len).away_bytes

    def tracked_bytes(self, batch_size: int, seq_len: int) -> int:
        """What operations make, at its peak."""
        return self._tracked(batch_size, seq_len).peak_bytes

    def _tracked(self, batch_size: int, seq_len: int) -> Tracked:
        key = (batch_size, seq_len)
        if key not in self._known:
            self._known[key] = self._extrapolated(batch_size, seq_len)
        return self._known[key]

    def _extrapolated(self, batch_size: int, seq_len: int) -> Tracked:
        lengths = [len(layers) for layers in self._lists]
        short = [min(SHORT, length) for length in lengths]
        total = base = self._measured(short, batch_size, seq_len)
        for index, length in enumerate(lengths):
            one_more = [count + (i == index) for i, count in enumerate(short)]
            more = base.plus(self._measured(one_more, batch_size, seq_len), length - SHORT)
            total = Tracked(*(t + m - b for t, m, b in zip(total, more, base, strict=True)))
        return total

    def _measured(self, lengths: Sequence[int], batch_size: int, seq_len: int) -> Tracked:
        meter = StorageMeter()
        away = SavedAway(meter) if self._choice.moves else None
        with self._mode, _cut(self._lists, lengths):
            meter.leave_out([*self._model.parameters(), *self._model.buffers()])
            batch = {key: self._cast(value) for key, value in self._subject.batch(batch_size, seq_len).items()}
            for value in batch.values():
                if isinstance(value, torch.Tensor):
                    meter.see(value)
            with meter, away.hooks() if away is not None else nullcontext():
                loss_of(self._model(**batch)).backward()
        return Tracked(meter.peak_bytes, away.peak_bytes if away is not None else 0)

    def _cast(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class Ways:
    """What a policy may do with saved tensors, in the order in which it is tried.

    Parameters
    ----------
    subject, dtype, checkpointing
        See `Activations`.
    policy
        One of `ACTIVATION_POLICIES`.
    disk_bytes
        0: there is no tier to which tensors could leave.
    """

    def __init__(self, subject: Subject, dtype: torch.dtype, checkpointing: bool, policy: str, disk_bytes: int) -> None:
        choices = [Choice(policy)] if policy != "auto" else [Choice.KEEP, Choice.RECOMPUTE, Choice.OFFLOAD]
        self.all = [
            Activations(subject, dtype, checkpointing, choice)
            for choice in choices
            if policy != "auto" or disk_bytes or not choice.moves
        ]

    def peak_bytes(self, batch_size: int, seq_len: int) -> int:
        """See `Activations.peak_bytes`; of the way that takes least."""
        return min(way.peak_bytes(batch_size, seq_len) for way in self.all)


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


def _run_again(blocks: Iterable[nn.Module]) -> None:
    """Have torch run each block's forward again in backward, as ``activation_policy="recompute"`` does."""
    for block in blocks:
        vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None

"""The hooks for tensors that a model's forward saves for backward: which may leave, and which stay."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Protocol

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..memory.non_model import Batch
from ..signals import uninterrupted
from ..torch_private import saving_is_taken, without_torch_function
from .counts import ActivationCounts
from .leavers import Leavers
from .store import ActivationStore
from .tensors import KeptTensor, MovedTensor, Packed, unpack

_FORBIDDEN = "don't yet support saved tensor hooks"
"""What torch says of transforms that cannot go with them."""


@contextmanager
def explain_transforms(policy: str) -> Iterator[None]:
    """Have an error of torch's about transforms name the option that hooks come from."""
    try:
        yield
    except RuntimeError as error:
        if _FORBIDDEN in str(error):
            raise RuntimeError(
                f"{error} activation_policy={policy!r} puts such hooks around the model; boost a model that uses "
                "these transforms in its forward with activation_policy='keep'"
            ) from error
        raise


class Saving(Protocol):
    """What becomes of the tensors that one model saves for backward."""

    counts: ActivationCounts

    def of_call(self) -> AbstractContextManager[object]:
        """A context for a call of the model."""

    def begin(self, batch: Batch) -> None:
        """The model's forward begins, in the call that is under way."""

    @property
    def keeps_until_short(self) -> bool:
        """True if everything is kept now, and less would be if memory ran out."""

    def ran_short(self, others_help: bool) -> bool:
        """Memory has run out in a forward or its backward.

        Parameters
        ----------
        others_help
            Model data have made room, so that the same forward may fit.

        Returns
        -------
        bool
            True if the next forward keeps less than this one.
        """

    def rest(self, seconds: float = 0.0) -> None:
        """Between two steps: see `ActivationStore.rest`."""

    def close(self) -> None:
        """End threads."""


class KeepAll:
    """Nothing moves, and no hook is there."""

    keeps_until_short = False

    def __init__(self) -> None:
        self.counts = ActivationCounts()
        self._nothing = nullcontext()

    def of_call(self) -> AbstractContextManager[object]:
        return self._nothing

    def begin(self, batch: Batch) -> None:
        pass

    def ran_short(self, others_help: bool) -> bool:
        return False

    def rest(self, seconds: float = 0.0) -> None:
        pass

    def close(self) -> None:
        pass


class Offload:
    """Tensors leave for a tier below where that frees memory.

    Parameters
    ----------
    store
        Moves them.
    leavers
        Says which ones.
    """

    keeps_until_short = False

    def __init__(self, store: ActivationStore, leavers: Leavers) -> None:
        self.counts = store.counts
        self._store = store
        self._leavers = leavers

    @contextmanager
    def of_call(self) -> Iterator[None]:
        if saving_is_taken():  # by hooks of the user's around the model, which are to see what it saves
            yield
            return
        hooks = ExitStack()
        try:
            with explain_transforms("offload"), hooks:
                hooks.enter_context(saved_tensors_hooks(self.pack, unpack))
                yield
        finally:
            hooks.close()  # an interrupt may have come before the context was left
        self.settle()

    def begin(self, batch: Batch) -> None:
        if batch.with_gradients:
            self._store.trim()

    @uninterrupted
    def settle(self) -> None:
        """Let all leave that only graphs hold, as far as that needs no waiting."""
        self._store.settle()

    def ran_short(self, others_help: bool) -> bool:
        return False

    def rest(self, seconds: float = 0.0) -> None:
        self._store.rest(seconds)

    def close(self) -> None:
        self._store.close()

    @uninterrupted
    def pack(self, tensor: Tensor) -> Packed:
        """What the graph holds in place of a tensor, which leaves if it may."""
        with without_torch_function():  # none of this is an operation of the model's
            if self._leavers.may_leave(tensor):
                return MovedTensor(tensor, self._store.save(tensor.untyped_storage()), self._store)
            return KeptTensor(tensor)

"""What gradients are multiplied by on their way to the optimizer: one over the loss scale of fp16, and clipping."""

import logging
from collections.abc import Container, Iterable, Sequence

import torch
from torch import Tensor

from ..chunk import Chunk, ChunkManager
from .gradient_norm import Found, clip_coefficient, find_gradients, first_nonfinite, in_model_order, total_norm
from .scaler import LossScaler

logger = logging.getLogger(__name__)


class Scaling:
    """The loss scale and clipping of one model's steps.

    Parameters
    ----------
    manager
        Has the gradients: those summed over all ranks, so that all come to the same factor.
    scaler
        The loss scale of fp16; None for dtypes that need none.
    max_norm
        Clip the gradients' 2-norm in every step; 0 for never.
    """

    def __init__(
        self,
        manager: ChunkManager,
        scaler: LossScaler | None,
        max_norm: float,
    ) -> None:
        self.scaler = scaler
        self.skipped_steps = 0
        self.was_skipped = False
        """The last step was."""
        self.grad_norm: float | None = None
        """The last norm computed, unscaled."""
        self._manager = manager
        self._is_scaled = False
        """The loss was multiplied by the loss scale, and so the gradients are."""
        self._clipping = 1.0
        """Clipping asked for so far: gradients are left alone, and the step multiplies this in."""
        self._max_norm = max_norm

    @property
    def clips(self) -> bool:
        """True if each step clips the gradients."""
        return self._max_norm > 0

    @property
    def has_clipped(self) -> bool:
        """True if the next step uses clipped gradients."""
        return self._clipping != 1.0

    @property
    def scale(self) -> float:
        """What the gradients are multiplied by as they are."""
        return self.scaler.scale if self.scaler is not None and self._is_scaled else 1.0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss that backward is to run on."""
        if self.scaler is None:
            return loss
        self._is_scaled = True
        return loss * self.scaler.scale

    def norm(self, parameters: Iterable[Tensor], order: float, error_if_nonfinite: bool) -> Tensor:
        """The norm of the gradients of these parameters together, unscaled.

        Raises
        ------
        RuntimeError
            If that is infinite or NaN, and ``error_if_nonfinite``.
        """
        norm = total_norm(self._manager, parameters, order) / self.scale
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"the total norm of order {order} of the gradients is {float(norm)}, so they cannot be clipped"
            )
        return norm

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Have the next step use gradients that are clipped to ``max_norm``, given their norm."""
        self.grad_norm = float(norm)
        self._clipping *= clip_coefficient(norm, max_norm)

    def of_step(self, chunks: Iterable[Chunk], parameters: Container[int], outside: Sequence[Tensor]) -> float | None:
        """What this step multiplies gradients with; None if it is to be skipped because one overflows.

        Parameters
        ----------
        chunks, parameters
            Where to find the gradients of these parameters (ids).
        outside
            Parameters outside of chunks.
        """
        scale, coefficient = self.scale, self._clipping
        if self.scaler is not None or self._max_norm > 0:
            found = find_gradients(chunks, parameters)
            norm = total_norm(self._manager, [*in_model_order(found), *outside], 2.0) / scale
            self.grad_norm = float(norm)
            if self.scaler is not None and not torch.isfinite(norm):
                self._skip(self.scaler, found)
                return None
            if self._max_norm > 0:
                coefficient *= clip_coefficient(norm, self._max_norm)
        return coefficient / scale

    def _skip(self, scaler: LossScaler, found: Iterable[Found]) -> None:
        before = scaler.scale
        scaler.update(overflow=True)
        self.skipped_steps += 1
        self.was_skipped = True
        logger.info(
            "step skipped: the gradient of %s overflows fp16 at loss scale %g; the scale is now %g",
            first_nonfinite(found),
            before,
            scaler.scale,
        )
        self._clipping = 1.0

    def stepped(self) -> None:
        """The step has used the factor."""
        self.was_skipped = False
        self._clipping = 1.0
        if self.scaler is not None:
            self.scaler.update(overflow=False)

    def forget(self) -> None:
        """The gradients are gone."""
        self._is_scaled, self._clipping = False, 1.0

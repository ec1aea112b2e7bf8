"""The seam between ``HybridAdam`` and whoever manages its parameters."""

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from .hybrid_adam import HybridAdam


class ManagedStep(Protocol):
    """What a boosted ``HybridAdam`` hands its work to. Each method replaces the one of the same name.

    The optimizer's own parts stay at hand for parameters that are not in chunks: ``HybridAdam.prepare_parameters``,
    ``HybridAdam.commit_parameters`` and ``HybridAdam.register_param_group``.
    """

    def step(self, optimizer: "HybridAdam") -> None:
        """Update every parameter that has a gradient. The closure, if any, has run."""

    def zero_grad(self, optimizer: "HybridAdam") -> None:
        """Forget the gradients."""

    def state_dict(self, optimizer: "HybridAdam") -> dict[str, Any]:
        """Return the states in ``torch.optim.AdamW``'s layout."""

    def load_state_dict(self, optimizer: "HybridAdam", state_dict: dict[str, Any]) -> None:
        """Take over states in ``torch.optim.AdamW``'s layout."""

    def add_param_group(self, optimizer: "HybridAdam", group: dict[str, Any]) -> None:
        """Add a group after boosting, or raise."""

    def clip_grad_by_norm(
        self, optimizer: "HybridAdam", max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> Tensor:
        """Arrange that the next step uses clipped gradients; return the norm before clipping."""

    def clip_grad_by_value(self, optimizer: "HybridAdam", value: float) -> None:
        """Arrange that the next step uses gradients clamped to ``[-value, value]``."""

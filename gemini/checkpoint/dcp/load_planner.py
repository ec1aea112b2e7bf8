"""The planner that loads: all is compared and checked before anything changes; then each rank reads its boxes."""

import io
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.optim import Optimizer

from ..ranks import loaded_by_all
from ..swapped import refuse_swapped
from .objects import loaded_object
from .optimizer_load import OptimizerLoad
from .pieces import Contents, Seat
from .reads import Arrivals
from .weights_load import WeightsLoad


class LoadPlanner(DefaultLoadPlanner):
    """Loads a model, and its optimizer, from a checkpoint of `torch.distributed.checkpoint`, ours or torch's.

    ::

        state = {"epoch": 0}
        with LoadPlanner(model, optimizer) as planner:
            torch.distributed.checkpoint.load(state, checkpoint_id=folder, planner=planner)

    `load` does more: there everything is checked before the model is touched, options of the optimizer among it, which
    here come together with the tensors. For that a planner has two plans: `first_plan` reads what is small, after which
    `check` compares all of it; `rest` reads what is to be at home here.

    Parameters
    ----------
    model
        Boosted, or plain.
    optimizer
        What `Booster.boost` returned, or a `HybridAdam`; None: the model alone.
    folder
        Where it is read from, for messages.
    strict
        Whether missing and unexpected tensors of the model are an error.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        folder: str | Path = "the checkpoint",
        *,
        strict: bool = True,
    ) -> None:
        super().__init__()
        self._contents = Contents(model, optimizer, Seat())
        self._folder = Path(folder)
        self._together = ExitStack()
        self._is_entered = False
        self._is_strict = strict
        self._objects: dict[str, Any] = {}
        """What is no tensor, by its name."""
        self._arrivals = Arrivals()
        self._loads: list[WeightsLoad | OptimizerLoad] = []

    def __enter__(self) -> "LoadPlanner":
        self._is_entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.check()
                self.finish()
        except BaseException as found:
            self._together.__exit__(type(found), found, found.__traceback__)
            raise
        self._together.__exit__(kind, error, traceback)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Compare names and shapes.

        Raises
        ------
        CheckpointError
            If something is missing or does not fit.
        RuntimeError
            While the parameters have the values of a running average.
        """
        refuse_swapped("dcp.load", self._contents.model, self._contents.optimizer)
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        self._loads = [WeightsLoad(self._contents, metadata, self._folder, self._is_strict)]
        if self._contents.optimizer is not None:
            self._loads.append(OptimizerLoad(self._contents, metadata, self._folder))

    def create_local_plan(self) -> LoadPlan:
        """All that is to be read here, for `torch.distributed.checkpoint.load`.

        Raises
        ------
        RuntimeError
            Outside of ``with``.
        """
        if not self._is_entered:
            raise RuntimeError("use it as a context manager: with LoadPlanner(model, optimizer) as planner: ...")
        return LoadPlan([*super().create_local_plan().items, *self.first_plan().items, *self.rest().items])

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """All ranks are about to read."""
        self._together.enter_context(loaded_by_all(self._contents.model, "dcp.load"))
        return new_plan

    def first_plan(self) -> LoadPlan:
        """What has to be known for the check."""
        return LoadPlan([item for load in self._loads for item in load.small(self._arrivals)])

    def check(self) -> None:
        """Check what has been read by the first plan.

        Raises
        ------
        CheckpointError
            If it cannot be loaded.
        """
        for load in self._loads:
            load.check(self._objects)

    def rest(self) -> LoadPlan:
        """What is read into its places."""
        return LoadPlan([item for load in self._loads for item in load.large(self._arrivals)])

    def finish(self) -> None:
        """Put what is no tensor into its places; everything else is there."""
        for load in self._loads:
            load.finish()

    # -- what storage readers call

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take in what is no tensor. No code in it is run."""
        name = read_item.dest_index.fqn
        self._objects[name] = loaded_object(name, value, self._folder)
        if name in self.state_dict:  # the caller's
            value.seek(0)
            super().load_bytes(read_item, value)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where a part of a tensor goes."""
        if self._arrivals.expects(read_item):
            return self._arrivals.target(read_item)
        target: Tensor = super().resolve_tensor(read_item)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """A part of a tensor is there."""
        if self._arrivals.expects(read_item):
            self._arrivals.arrived(read_item)

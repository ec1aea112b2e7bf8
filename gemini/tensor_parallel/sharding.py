"""How a tensor lies over the ranks of a tensor-parallel group. Imported only where there are such tensors."""

from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist
from torch import Size, Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from ..lazy.sharding import shard
from ..torch_private import LOCAL_TENSOR

_GONE = (
    "this DTensor was a parameter of a model that has been boosted since, whose chunks have its values. Ask the model "
    "for it, as model.<module>.weight or model.parameters() do"
)


@dataclass(frozen=True, slots=True)
class Sharding:
    """The whole tensor, and what each rank of a mesh of one dimension has of it."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, distributed: DTensor) -> "Sharding":
        return cls(distributed.device_mesh, distributed.placements, distributed.shape, distributed.stride())

    @property
    def is_sharded(self) -> bool:
        """True if no rank has all of it."""
        return any(placement.is_shard() for placement in self.placements)

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that have parts of it."""
        return self.mesh.get_group()

    def offsets(self) -> tuple[int, ...]:
        """Where this rank's part begins in the whole tensor."""
        found = [0] * len(self.shape)
        for placement in self.placements:
            if isinstance(placement, Shard):
                numel = self.shape[placement.dim]
                found[placement.dim] = min(self.mesh.get_local_rank() * -(-numel // self.mesh.size()), numel)
        return tuple(found)

    def distribute(self, local: Tensor) -> DTensor:
        """The distributed tensor over this part."""
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )

    def gather(self, local: Tensor) -> Tensor:
        """The whole tensor, on the device of ``local``. All ranks of the group call this at once."""
        if not self.is_sharded:
            return local
        whole = self.distribute(local.to(self.mesh.device_type)).full_tensor()
        return whole.to(local.device)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of the whole tensor."""
        return shard(whole, self.mesh, self.placements).to_local()


class Replaced(DTensor):
    """A `DTensor` that was a parameter before boost: the model has a `LocalPart` in its place."""

    __slots__ = ()

    def __getattr__(self, name: str) -> NoReturn:
        """The part is asked for, which is not there."""
        raise RuntimeError(_GONE)

    @classmethod
    def __torch_function__(cls, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(_GONE)

    @staticmethod
    def replace(parameter: DTensor) -> None:
        """Let go of the memory of a parameter; who still has the object is told where to look."""
        delattr(parameter, LOCAL_TENSOR)
        parameter.__class__ = Replaced

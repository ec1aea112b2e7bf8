"""The ranks that a job runs on, where ``torchrun`` or another launcher has started several."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This rank and how many there are. The first one alone prints and writes a sample."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def here() -> "Ranks":
        """Those of the process group, if there is one."""
        return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def of_first(self, value: str) -> str:
        """What the first rank has."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def mean(self, value: float, device: torch.device) -> float:
        """The mean of what the ranks have."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return float(total) / self.count

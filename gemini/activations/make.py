"""From what the user asked for to what becomes of saved tensors."""

from ..chunk import ChunkManager, tuned
from ..config import GeminiConfig
from ..memory.capacity import Capacities
from ..telemetry.layout import disks_folder
from .disk import ActivationFile
from .place import Place
from .saving import KeepAll, Offload, Saving
from .store import ActivationStore

LIMIT_BYTES = 32 << 20
"""What may be on its way, in each direction."""
EXPECTED_BYTES = 1 << 30
"""For the choice of the disk's requests: how much will be stored is not known yet."""


def check_place(config: GeminiConfig, capacities: Capacities) -> None:
    """Refuse a policy that has no tier to move tensors to.

    Raises
    ------
    ValueError
        If the memory that computes is RAM and there is no disk tier.
    """
    if config.activation_policy == "offload" and capacities.device.type == "cpu" and config.offload_dir is None:
        raise ValueError(
            "activation_policy='offload' moves saved tensors from the memory that computes to a tier below; here that "
            "memory is RAM, and there is no disk tier. Set offload_dir to a folder, or use activation_policy='keep'"
        )


def make_saving(config: GeminiConfig, capacities: Capacities, manager: ChunkManager) -> Saving:
    """What the policy says.

    Raises
    ------
    OffloadError, OutOfMemory
        If a file or a thread for it cannot be had.
    """
    if config.activation_policy == "keep":
        return KeepAll()
    places: list[Place] = []
    if config.offload_dir is not None:
        requests = tuned(config.offload_dir, EXPECTED_BYTES, disks_folder())
        places.append(ActivationFile(config.offload_dir, manager.ledger, requests, config.disk_checksums))
    store = ActivationStore(places, LIMIT_BYTES)
    return Offload(store, capacities.device, (chunk.full for chunk in manager.chunks))

"""Chunks: fixed-size pieces of model data that live on tiers and move between them.

Knows tensors, tiers and bytes; knows nothing of modules, hooks, optimizers or policies.
"""

from gemini.process_wide import IO_STACK_BYTES

from .accelerator import AcceleratorBackend
from .accelerator_driver import AcceleratorDriver, Lane, Mark
from .accelerators import accelerator_in_use, driver_of, find_accelerator, memory_of
from .away import QUIET, Keeper, reach
from .block_codes import warm_up as warm_up_codes
from .block_format import FORMATS, BlockFormat, dequantise, quantise
from .buffer import Buffer, MemoryBuffer, Room
from .checksums import Checksums
from .chunk import Chunk
from .communicator import ALONE, Communicator, SingleProcess, all_or_none
from .content import BufferSpec, Codec, Marked, MasterCodec, Plain, SplitBf16, WithShadow
from .copyable import converts, copy_fault
from .disk import DiskBackend, DiskBuffer
from .disk_file import PAGE_BYTES, DiskFile, Requests
from .disk_tuning import tuned
from .free_room import FreeRoom
from .gradient import GradientBuffer
from .gradient_tensors import GradientTensors
from .layout import ChunkLayout, Slot, TensorSpec, pack
from .ledger import Ledger
from .manager import ChunkManager
from .memory import FETCH_WORKERS, Caller, DeviceBackend, NoDevice, RamBackend, Transfer
from .memory_map import MemoryMap
from .names import ABSMAX, GRADIENT, MASTER, MASTER_LOW, RESERVED, SHADOW
from .own_part import can_write_own_part, own_place, read_own_part, write_own_part
from .plan import ChunkPlan
from .quantised import Quantised
from .search import ChunkSearch, search_chunk_numel
from .shared_gradient import Gradient, SharedGradient
from .slot_values import SlotValues, accept_replaced, open_to_replace, open_values
from .split_master import halves, joined, marked, unmarked
from .staging import Staging, pieces
from .state import VALID, ChunkState
from .tier import Tier
from .together import Together
from .values import announce_change, read_part, read_slot, write_part, write_slot
from .workers import close_in_background, start_workers
from .write_behind import STORE_BLOCKS

__all__ = [
    "ABSMAX",
    "ALONE",
    "FETCH_WORKERS",
    "FORMATS",
    "GRADIENT",
    "IO_STACK_BYTES",
    "MASTER",
    "MASTER_LOW",
    "PAGE_BYTES",
    "QUIET",
    "RESERVED",
    "SHADOW",
    "STORE_BLOCKS",
    "VALID",
    "AcceleratorBackend",
    "AcceleratorDriver",
    "BlockFormat",
    "Buffer",
    "BufferSpec",
    "Caller",
    "Checksums",
    "Chunk",
    "ChunkLayout",
    "ChunkManager",
    "ChunkPlan",
    "ChunkSearch",
    "ChunkState",
    "Codec",
    "Communicator",
    "DeviceBackend",
    "DiskBackend",
    "DiskBuffer",
    "DiskFile",
    "FreeRoom",
    "Gradient",
    "GradientBuffer",
    "GradientTensors",
    "Keeper",
    "Lane",
    "Ledger",
    "Mark",
    "Marked",
    "MasterCodec",
    "MemoryBuffer",
    "MemoryMap",
    "NoDevice",
    "Plain",
    "Quantised",
    "RamBackend",
    "Room",
    "Requests",
    "SharedGradient",
    "SingleProcess",
    "Slot",
    "SlotValues",
    "SplitBf16",
    "Staging",
    "TensorSpec",
    "Tier",
    "Together",
    "Transfer",
    "WithShadow",
    "all_or_none",
    "accelerator_in_use",
    "announce_change",
    "can_write_own_part",
    "driver_of",
    "close_in_background",
    "converts",
    "copy_fault",
    "dequantise",
    "find_accelerator",
    "halves",
    "joined",
    "marked",
    "memory_of",
    "own_place",
    "pack",
    "pieces",
    "quantise",
    "read_own_part",
    "read_part",
    "search_chunk_numel",
    "start_workers",
    "tuned",
    "unmarked",
    "warm_up_codes",
    "write_own_part",
    "write_part",
    "read_slot",
    "write_slot",
    "reach",
    "accept_replaced",
    "open_to_replace",
    "open_values",
]

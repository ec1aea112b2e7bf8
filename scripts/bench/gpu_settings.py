"""What `gpu.py` asks of each part, for a machine with a GPU and in small."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A GPT by its name in the table."""

    name: str
    layers: int
    hidden: int

    def parameters(self, vocabulary: int, length: int) -> int:
        """Elements, with a tied head."""
        return 12 * self.layers * self.hidden**2 + (vocabulary + length) * self.hidden


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Sizes of everything that is measured."""

    sizes: tuple[Size, ...]
    tokens: tuple[int, ...]
    """Of a step; each training takes all of them, one after the other."""
    length: int
    """Of a sequence; a step has as many as its tokens need."""
    vocabulary: int
    steps: int
    """That are timed, after those that warm up."""
    device: str
    """``auto``: the accelerator, or the CPU where there is none. ``sim``: the simulated one."""
    numel: int
    """Elements of an update that is measured."""
    copy_bytes: int
    """Of a copy that is measured."""
    widest: int
    """Width of the blocks of the largest model."""
    most_layers: int
    """No more are tried."""
    part_seconds: dict[str, float]
    """What each kind of part may take."""
    disk_bytes: int
    """Of the largest model; 0: no disk."""


FULL = Settings(
    sizes=(Size(name="1.3B", layers=24, hidden=2048), Size(name="7B", layers=32, hidden=4096)),
    tokens=(4096, 16384, 32768),
    length=2048,
    vocabulary=32000,
    steps=2,
    device="auto",
    numel=1 << 27,
    copy_bytes=1 << 30,
    widest=4096,
    most_layers=512,
    part_seconds={
        "tests": 120, "bandwidth": 45, "step 1.3B": 45, "step 7B": 90, "peer": 60, "largest": 90, "trace": 45
    },
    disk_bytes=0,
)  # fmt: skip

REDUCED = Settings(
    sizes=(Size(name="small", layers=2, hidden=64),),
    tokens=(64, 128),
    length=32,
    vocabulary=256,
    steps=1,
    device="auto",
    numel=1 << 16,
    copy_bytes=1 << 20,
    widest=64,
    most_layers=1,
    part_seconds={"tests": 40, "bandwidth": 20, "step small": 25, "peer": 25, "largest": 30, "trace": 25},
    disk_bytes=0,
)

"""Values that go from files straight to their places, in parts."""

from typing import Protocol

from .flat_values import FlatValues
from .progress import Progress
from .safetensors_stream import SafetensorsFile


class Place(Protocol):
    """Where the values of one tensor go."""

    def open_to_replace(self) -> FlatValues | None:
        """The values where they are, all of which are going to be replaced; None where they cannot be had in parts."""

    def replaced(self) -> None:
        """Values have been replaced by means of `open_to_replace`."""


class Filling:
    """Collects tensors of files with their places, and then reads each file once from its beginning to its end."""

    def __init__(self) -> None:
        self._of_file: dict[SafetensorsFile, dict[str, FlatValues]] = {}
        self._places: list[Place] = []

    def take(self, place: Place, file: SafetensorsFile, name: str) -> bool:
        """Fill a place later; False if that is not possible, and its values have to be read as a whole."""
        targets = self._of_file.setdefault(file, {})
        if name in targets or (values := place.open_to_replace()) is None:
            return False
        self._places.append(place)
        targets[name] = values
        return True

    def run(self) -> None:
        """Read all that was taken.

        Raises
        ------
        CheckpointError
            If a file cannot be read to its end, or is not the one that was verified any more.
        """
        sizes = {file: sum(file.records[name].nbytes for name in names) for file, names in self._of_file.items()}
        try:
            with Progress("loading", sum(sizes.values())) as progress:
                for file, targets in self._of_file.items():
                    file.load(targets, progress.part(sizes[file]))
        finally:
            for place in self._places:
                place.replaced()

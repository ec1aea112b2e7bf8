"""Whatever of a save has reached the disk when the power fails, the old checkpoint or the new one is there, whole."""

import os
import random
import shutil
from collections import Counter

from forms import NEW, OLD, Prepared
from operations import intercepted
from power_loss import Disk, Recorded, seen_tree, tree_of, trees, write_tree


def test_after_a_power_loss_at_any_call(case: Prepared) -> None:
    case.begin()
    root = case.work.parent
    disk, recorded = Disk.of(case.work), Recorded()
    with intercepted(root, recorded):
        case.save()
    calls = [call for call in recorded.calls if case.work in (call.path, *call.path.parents)]
    expected = tree_of(case.work)
    replayed = Disk.of(case.folder)
    for call in calls:
        replayed.apply(call, case.work)
    assert seen_tree(replayed) == expected, "something was done that was not seen"

    outcomes: Counter[int] = Counter()
    for n, tree in trees(case.work, disk, calls, random.Random(0)):
        shutil.rmtree(case.work)
        case.work.mkdir()
        write_tree(case.work, tree)
        found = case.found()
        outcomes[found] += 1
        assert found == NEW or n < len(calls), "the save had returned, and is lost"
        if sum(outcomes.values()) % 8 == 0:
            case.check_later_saves()
    assert outcomes[OLD] and outcomes[NEW], outcomes


def test_the_model_of_a_disk_loses_what_was_not_synced(tmp_path) -> None:
    """Without its syncs a rename over an old file may leave an empty one, and with them it cannot."""
    (tmp_path / "file").write_bytes(b"old")
    for syncs in (True, False):
        disk, recorded = Disk.of(tmp_path), Recorded()
        with intercepted(tmp_path, recorded):
            _replace(tmp_path, syncs)
        found = {tree["file"] for _, tree in trees(tmp_path, disk, recorded.calls, random.Random(0))}
        assert found == ({b"old", b"new"} if syncs else {b"old", b"new", b"", b"\0\0\0"})
        (tmp_path / "file").write_bytes(b"old")


def _replace(folder, syncs: bool) -> None:
    fd = os.open(folder / "draft", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"new")
    if syncs:
        os.fsync(fd)
    os.close(fd)
    os.replace(folder / "draft", folder / "file")

"""Ranks that save together each write files of their own; whatever happens on one, all are told and the old stays."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_training import SMALL, Training, Where
from safetensors import safe_open
from world import World, Worlds

from gemini.checkpoint import shared_stage
from gemini.checkpoint.division import divided, writers_of
from gemini.errors import CheckpointError, RankError
from gemini.ranks import peers

WAYS = ("hf", "dcp")


def trained(steps: int = 1) -> Training:
    training = Training(Where.RANKS, steps=steps, **SMALL)
    training.train()
    return training


def save(training: Training, folder: str, layout: str) -> str:
    return str(training.booster.save(folder, model=training.model, optimizer=training.optimizer, layout=layout))


# -- who writes what


def test_each_tensor_is_written_by_the_rank_that_has_most_of_it_and_all_write_as_much() -> None:
    sizes = [100, 100, 100, 100, 4, 4, 7]
    shares = [[60, 40], [100, 0], [10, 90], [100, 0], [4, 0], [0, 4], []]
    writers = writers_of(sizes, shares, [0, 1])
    assert writers[2] == 1
    assert writers[5] == 1
    assert writers[6] == 0, "what is not in chunks is the first one's"
    loads = [sum(size for size, rank in zip(sizes, writers, strict=True) if rank == index) for index in (0, 1)]
    assert abs(loads[0] - loads[1]) <= 8


def test_a_single_writer_writes_files_in_order() -> None:
    assert divided("abcd", [3, 3, 3, 9], [[1, 1]] * 4, [0], 6) == [(0, ["a", "b"]), (0, ["c"]), (0, ["d"])]
    assert divided("", [], [], [0, 1], None) == [(0, [])]


def save_both_ways(folder: str) -> None:
    """Together, and by the first rank alone."""
    peers._HELP_SECONDS = 30.0  # the machine may be busy
    training = trained()
    training.booster.save_model(training.model, f"{folder}/all")
    training.booster.save_optimizer(training.optimizer, f"{folder}/all")
    peers._HELP_SECONDS = 1.0
    if dist.get_rank() == 0:
        training.booster.save_model(training.model, f"{folder}/one", shard=True)
        training.booster.save_optimizer(training.optimizer, f"{folder}/one", shard=True)
    dist.barrier()
    return dist.get_rank(), dict.fromkeys(sorted(os.listdir(f"{folder}/all")), True)


def tensors_of(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob(f"{kind}*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


def test_files_of_all_ranks_have_what_the_first_one_writes_alone(worlds: Worlds, tmp_path: Path) -> None:
    worlds(2).run(save_both_ways, str(tmp_path))
    for kind, index in [("model", "model.safetensors.index.json"), ("optimizer", "optimizer.json")]:
        alone, together = tensors_of(tmp_path / "one", kind), tensors_of(tmp_path / "all", kind)
        assert alone.keys() == together.keys()
        assert all(torch.equal(alone[name], together[name]) for name in alone)
        weight_map = json.loads((tmp_path / "all" / index).read_bytes())["weight_map"]
        assert weight_map.keys() == alone.keys()
        sizes = dict.fromkeys(weight_map.values(), 0)
        for name, file in weight_map.items():
            sizes[file] += alone[name].nbytes
        assert len(sizes) == 2
        assert max(sizes.values()) < 0.6 * sum(sizes.values())
    assert not [path for path in (tmp_path / "all").iterdir() if path.name.startswith(".")]


# -- what goes wrong


def fail_on(rank: int, folder: str, layout: str, how: str) -> tuple[str, str]:
    """Save, and then once more where one rank fails. Returns the error, and what is newest then."""
    training = trained()
    first = save(training, folder, layout)
    if dist.get_rank() == rank:
        if how == "full disk":
            os.environ["NO_ROOM"] = "1"
            break_writes()
        elif how == "another folder":
            shared_stage._PATIENCE_SECONDS = 0.2
            hide(folder)
    error = ""
    try:
        save(training, folder, layout)
    except (CheckpointError, RankError, OSError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    finally:
        mend()
    dist.barrier()
    left = sorted(path.name for path in Path(folder).iterdir())
    training.booster.load(folder, model=training.model, optimizer=training.optimizer)
    training.update()  # ranks agree on the state that they are in
    return error, f"{Path(first).name}: {left}"


_mended: list[Callable[[], None]] = []


def break_writes() -> None:
    from gemini.checkpoint.output import Output

    def fail(self: Any, *_: Any) -> int:
        raise self._failure(OSError(28, "No space left on device"))

    for name in ("write", "write_at"):
        before = getattr(Output, name)
        setattr(Output, name, fail)
        _mended.append(lambda name=name, before=before: setattr(Output, name, before))


def hide(folder: str) -> None:
    """This rank sees another folder under the name."""
    before = Path.read_text

    def read_text(path: Path, *args: Any) -> str:
        if path.name == shared_stage.SEEN:
            raise FileNotFoundError(path)
        return before(path, *args)

    Path.read_text = read_text  # type: ignore[method-assign, assignment]
    _mended.append(lambda: setattr(Path, "read_text", before))


def mend() -> None:
    while _mended:
        _mended.pop()()


@pytest.mark.parametrize("layout", WAYS)
@pytest.mark.parametrize(
    ("how", "rank", "says"),
    [("full disk", 1, "No space left"), ("full disk", 0, "No space left"), ("another folder", 1, "one file system")],
)
def test_a_failure_on_one_rank_is_an_error_on_all_and_the_old_one_stays(
    how: str, rank: int, says: str, layout: str, worlds: Worlds, tmp_path: Path
) -> None:
    for error, left in worlds(2).run(fail_on, rank, str(tmp_path), layout, how):
        assert says in error
        assert left == "checkpoint-000001: ['checkpoint-000001', 'latest']"


def kill_at(phase: str, folder: str, layout: str) -> str:
    """Save, train, and be killed on rank 1 in the next save."""
    training = trained()
    save(training, folder, layout)
    training.train()
    if dist.get_rank() == 1:
        from gemini.checkpoint import output
        from gemini.checkpoint.dcp import save_planner, storage

        die: Callable[..., Any] = lambda *_, **__: os.kill(os.getpid(), 9)  # noqa: E731
        if phase == "while it writes":
            output.Output.write = output.Output.write_at = die  # type: ignore[method-assign]
        elif phase == "after it has written":
            storage.Writer.write_data = dying_after(storage.Writer.write_data)  # type: ignore[method-assign]
            output.Output.__exit__ = dying_after(output.Output.__exit__)  # type: ignore[method-assign]
        else:
            save_planner.SavePlanner.create_local_plan = die  # type: ignore[method-assign]
            training.booster.save = die  # type: ignore[method-assign]
    save(training, folder, layout)
    return "saved"


def dying_after(call: Callable[..., Any]) -> Callable[..., Any]:
    def died(*args: Any) -> None:
        call(*args)
        os.kill(os.getpid(), 9)

    return died


def load_what_is_there(folder: str) -> int:
    training = Training(Where.RANKS, **SMALL)
    training.booster.load(folder, model=training.model, optimizer=training.optimizer)
    return int(next(iter(training.end().states.values()))["step"])


PHASES = ["before it writes", "while it writes", "after it has written"]


@pytest.mark.heavy
@pytest.mark.parametrize("layout", WAYS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_is_killed_is_an_error_on_the_others_and_the_old_one_loads(
    phase: str, layout: str, worlds: Worlds, tmp_path: Path
) -> None:
    with World(2) as world:
        survivor, killed = world.outcomes(kill_at, phase, str(tmp_path), layout)
    assert killed.is_dead
    assert survivor.error.startswith("RankError: rank 1 "), survivor.error
    assert worlds(2).run(load_what_is_there, str(tmp_path)) == [1, 1]

"""Forked children: one that only inherits a boosted model goes on, one that uses it is told, and none hangs."""

import copy
import gc
import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, Trained, batch, check_same
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import gemini
from gemini.boosted import boosted
from gemini.errors import ForkError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # of Python 3.12, whenever there are threads
    pytest.mark.usefixtures("one_thread"),
]

SECONDS = 60.0


def in_child(work: Callable[[], Any]) -> Any:
    """What ``work`` gives in a forked child, or the exception that ended it."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                outcome = work()
            except BaseException as error:
                outcome = error
            os.write(writable, pickle.dumps(outcome))
        finally:
            os._exit(0)
    os.close(writable)
    try:
        if not select.select([readable], [], [], SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            pytest.fail(f"the child hangs in {work}")
        return pickle.loads(os.read(readable, 1 << 16))
    finally:
        os.close(readable)
        os.waitpid(child, 0)


def trained(where: str, folder: Any, **plugin: Any) -> Trained:
    placement = dict(PLACEMENTS[where])
    if "offload_dir" in placement:
        placement["offload_dir"] = folder
    run = Trained(placement, **plugin)
    torch.manual_seed(7)
    run.step(0)
    return run


def away(run: Trained) -> Tensor:
    chunk = next(c for c in boosted(run.model).manager.chunks if not c.is_resident)
    return chunk.bindings[0].parameter


@pytest.mark.parametrize("where", PLACEMENTS)
def test_using_a_model_in_a_child_is_refused_at_once(where: str, tmp_path: Any) -> None:
    run = trained(where, tmp_path)
    run.backward(run.loss(1))  # gradients and moves are there
    file = tmp_path / "saved"
    values = {name: torch.zeros(p.shape) for name, p in run.model.named_parameters()}
    uses: list[Callable[[], Any]] = [
        lambda: run.model(batch(0)).sum().item(),
        lambda: run.model.eval()(batch(0)).sum().item(),
        lambda: run.step(2),
        lambda: run.optimizer.step(),
        lambda: run.model.state_dict(),
        lambda: next(iter(gemini.named_tensors(run.model))),
        lambda: run.booster.save_model(run.model, file),
        lambda: run.booster.save_optimizer(run.optimizer, file),
        lambda: run.optimizer.state_dict(),
        lambda: run.model.load_state_dict(values),
    ]
    if where != "resident":  # there a part is a reader of values in memory, as any other code
        uses.append(lambda: run.model[0](batch(0)).sum().item())
    for use in uses:
        outcome = in_child(use)
        assert isinstance(outcome, ForkError), outcome
        assert "num_workers=0" in str(outcome)
    assert not list(file.glob("*"))
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step(2)
    plain = Trained(None)
    for number in range(3):
        if number == 0:
            torch.manual_seed(7)
        plain.step(number)
    check_same(run, plain)


@pytest.mark.parametrize("where", ["streamed", "disk"])
def test_reading_a_parameter_that_is_away_does_not_wait_for_ever(where: str, tmp_path: Any) -> None:
    run = trained(where, tmp_path)
    with torch.no_grad():
        name = next(n for n, p in run.model.named_parameters() if p is away(run))
        index = int(name.split(".")[0])
    outcome = in_child(lambda: getattr(run.model[index], name.split(".")[1]).sum().item())
    assert isinstance(outcome, ForkError), outcome


def test_values_in_memory_are_whole_in_a_child_though_updates_were_pending(tmp_path: Any) -> None:
    run = trained("resident", tmp_path)
    for number in range(1, 4):
        run.step(number)
        outcome = in_child(lambda: [p.detach().double().sum().item() for p in run.model.parameters()])
        assert outcome == [p.detach().double().sum().item() for p in run.model.parameters()]


def harmless(run: Trained) -> Any:
    names = [(name, tuple(p.shape), str(p.dtype)) for name, p in run.model.named_parameters()]
    run.model.train()
    stats = run.model.memory_stats()
    groups = copy.copy(run.optimizer.param_groups[0]["lr"])
    return len(names), "chunk/count" in stats, groups, boosted(run.model).step_count


def dropped(run: Trained) -> Any:
    alive = weakref.ref(boosted(run.model).manager)
    run.__dict__.clear()
    gc.collect()
    return alive() is None


def own_training(run: Trained) -> Any:
    other = Trained({})
    torch.manual_seed(7)
    return [other.step(number) for number in range(2)]


def test_a_child_may_look_drop_and_boost_its_own(tmp_path: Any) -> None:
    run = trained("disk", tmp_path)
    expected = [Trained(None)]
    torch.manual_seed(7)
    losses = [expected[0].step(number) for number in range(2)]
    assert in_child(lambda: harmless(run)) == harmless(run)
    assert in_child(lambda: dropped(run)) is True
    assert in_child(lambda: own_training(run)) == losses
    run.step(1)


class Plain(Dataset[Tensor]):
    def __init__(self, owner: Any = None) -> None:
        self.owner = owner

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return batch(index, 1)[0]


class Mining(Plain):
    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.owner(batch(index, 1))[0]  # type: ignore[no-any-return]


def test_dataloader_workers_may_inherit_a_model_but_not_use_it(tmp_path: Any) -> None:
    run = trained("streamed", tmp_path)
    run.model.eval()  # without dropout
    options: dict[str, Any] = {"batch_size": 2, "num_workers": 1, "timeout": 60, "multiprocessing_context": "fork"}
    for owner in (None, run.model):
        with torch.no_grad():
            batches = [run.model(x).sum().item() for x in DataLoader(Plain(owner), **options)]
            assert batches == [run.model(torch.cat([batch(i, 1), batch(i + 1, 1)])).sum().item() for i in (0, 2)]
    with pytest.raises(ForkError, match="num_workers=0"):
        list(DataLoader(Mining(run.model), **options))
    process = multiprocessing.get_context("fork").Process(target=harmless, args=(run,))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0


def test_forking_keeps_no_model_alive(tmp_path: Any) -> None:
    run = trained("streamed", tmp_path)
    assert in_child(lambda: 1) == 1
    alive = [weakref.ref(run.model), weakref.ref(boosted(run.model).manager)]
    del run
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


SCRIPT = """
import os, sys, torch
from torch import nn
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import ForkError
model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
plugin = GeminiPlugin(telemetry=sys.argv[1] + "/run", device_memory="40KiB", host_memory="300KiB",
                      offload_dir=sys.argv[1], chunk_config_dict={1: {"chunk_size": 1024}})
model, optimizer, *_ = Booster(plugin=plugin).boost(model, torch.optim.AdamW(model.parameters()))
def step():
    model(torch.ones(2, 64)).float().sum().backward(); optimizer.step(); optimizer.zero_grad()
step()
child = os.fork()
if child == 0:
    try:
        step()
    except ForkError:
        del model, optimizer
        sys.exit(7)  # through every exit handler
step()
assert os.waitpid(child, 0)[1] == 7 << 8
step()
print("parent goes on")
"""


def test_the_end_of_a_child_ends_nothing_of_its_parents(tmp_path: Any) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "parent goes on\n"), done.stderr
    records = [record for file in (tmp_path / "run").glob("*.jsonl") for record in file.read_text().splitlines()]
    assert sum('"type":"end"' in record.replace(" ", "") for record in records) == 1

"""Models that share a budget, and budgets that share a machine. The models are numbers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from weakref import ref

import pytest

from gemini.lease import holder, part
from gemini.lease.asked import Asked, as_text
from gemini.lease.budget import Budget
from gemini.lease.folder import LeaseFolder
from gemini.lease.holder import Holder, own_standing
from gemini.lease.limits import Limit
from gemini.lease.part import MachinePart
from gemini.lease.pressure import PressureGauge
from gemini.lease.room import capacity_of, room_of
from gemini.lease.seat import Seat, Use
from gemini.lease.sharing import Claim
from gemini.lease.standing import HOST

GIB = 1 << 30


class Machine:
    """RAM of which models take parts."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder = LeaseFolder(folder)
        self.total = total
        self.models: list[Model] = []
        self.elsewhere = 0
        self.gauge = Pressed()

    @property
    def free(self) -> int:
        return max(0, self.total - self.elsewhere - sum(model.used for model in self.models))

    def limits(self) -> list[Limit]:
        return [Limit("RAM", self.free, self.total, True, "the machine")]

    def part(self) -> MachinePart:
        holder = Holder({}, own_standing("job", "p", 0, 1), self.folder)
        return MachinePart(holder, self.gauge)


class Pressed(PressureGauge):
    """Says what it is told."""

    def __init__(self) -> None:
        self.answer = False

    def is_pressed(self, now: float) -> bool:
        return self.answer


class Model:
    """An occupant that keeps homes, and fills what is left with copies."""

    def __init__(
        self, machine: Machine, budget: Budget, wish: int, floor: int = GIB // 4, least: int = GIB // 8
    ) -> None:
        self.machine, self.budget, self.wish, self.floor, self.least = machine, budget, wish, floor, least
        self.is_idle, self.non_model_bytes, self.used, self.moves = True, 0, 0, 0
        self.seat = Seat({HOST: Claim(floor=floor, wish=wish)}, {})
        measured = lambda: {HOST: capacity_of(machine.free)}  # noqa: E731
        self.capacity = budget.join(self.seat, measured, {HOST: machine.limits}, machine.part)[HOST]
        self.seat.occupy(ref(self))
        machine.models.append(self)
        self.homes = min(self.capacity, wish)
        self.used = self.homes
        budget.settled()

    def uses(self) -> Mapping[str, Use]:
        claim = Claim(floor=self.floor, wish=self.wish)
        return {HOST: Use(claim=claim, capacity=self.capacity, used=self.used, least=max(self.homes, self.least))}

    def cut(self, memory: str, nbytes: int) -> int:
        self.capacity = max(min(self.capacity, nbytes), self.homes)
        self.used = min(self.used, self.capacity)
        return self.capacity

    def grow(self, memory: str, nbytes: int) -> None:
        self.capacity = nbytes

    def resize(self, nbytes: Mapping[str, int]) -> None:
        if nbytes[HOST] < self.floor:
            raise MemoryError("it needs more")
        self.moves += 1
        self.capacity = nbytes[HOST]
        self.homes = self.used = min(self.wish, self.capacity)

    def follow(self) -> None:
        """What a model does at its next step."""
        self.budget.look(self.seat)
        for memory, nbytes in self.budget.targets(self.seat).items():
            self.resize({memory: nbytes})
            self.budget.resized(self.seat, {memory: nbytes})


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(part, "WAIT_SECONDS", 0.0)
    found = Machine(tmp_path / "leases", 10 * GIB)
    monkeypatch.setattr(holder, "private_ram", lambda *_, **__: 1 + sum(model.used for model in found.models))
    return found


@pytest.fixture
def budgets() -> Iterator[list[Budget]]:
    found = [Budget() for _ in range(3)]
    yield found
    for budget in found:
        for seat in list(budget._seats):
            budget.leave(seat)


def test_a_model_alone_may_take_what_is_free_and_promises_no_more_than_it_can_use(
    machine: Machine, budgets: list[Budget]
) -> None:
    model = Model(machine, budgets[0], wish=2 * GIB)
    assert model.capacity == capacity_of(10 * GIB)
    (standing,) = machine.folder.standings().values()
    assert standing.holdings[HOST].held == room_of(2 * GIB)


def test_two_runs_that_both_fit_do_not_move(machine: Machine, budgets: list[Budget]) -> None:
    first = Model(machine, budgets[0], wish=2 * GIB)
    second = Model(machine, budgets[1], wish=3 * GIB)
    for model in (first, second, first, second):
        model.follow()
    assert first.moves == second.moves == 0
    assert second.homes == 3 * GIB


def test_the_second_run_makes_the_first_give_back_and_both_settle(machine: Machine, budgets: list[Budget]) -> None:
    first = Model(machine, budgets[0], wish=9 * GIB)
    assert first.homes == 8 * GIB
    second = Model(machine, budgets[1], wish=9 * GIB)  # it does not wait here, and takes what there is
    for _ in range(4):
        first.follow()
        second.follow()
    for _ in range(20):
        moves = first.moves, second.moves
        first.follow()
        second.follow()
        assert (first.moves, second.moves) == moves or second.moves == 1
    assert first.homes + second.homes <= capacity_of(10 * GIB)
    assert first.homes == pytest.approx(capacity_of(5 * GIB), rel=0.06)


def test_a_run_that_ends_leaves_its_memory_to_the_others(
    machine: Machine, budgets: list[Budget], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Model(machine, budgets[0], wish=9 * GIB), Model(machine, budgets[1], wish=9 * GIB)
    first.follow()
    assert first.homes < 5 * GIB
    machine.models.remove(second)
    budgets[1].leave(second.seat)
    now = [0.0]
    monkeypatch.setattr(part.time, "monotonic", lambda: now[0])
    for _ in range(10):
        now[0] += 1.0
        first.follow()
    assert first.homes == 8 * GIB


def test_a_neighbour_that_allocates_takes_room_and_gives_it_back(
    machine: Machine, budgets: list[Budget], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(part.time, "monotonic", lambda: now[0])
    model = Model(machine, budgets[0], wish=6 * GIB)
    assert model.homes == 6 * GIB
    machine.elsewhere = 4 * GIB  # 6 are left in all
    model.follow()
    assert model.homes == capacity_of(6 * GIB)
    machine.elsewhere = 0
    for _ in range(10):
        now[0] += 1.0
        model.follow()
    assert model.homes == 6 * GIB
    assert model.moves == 2


def test_pressure_takes_room_step_by_step_down_to_the_floor(
    machine: Machine, budgets: list[Budget], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(machine, budgets[0], wish=4 * GIB)
    machine.gauge.answer = True
    for _ in range(30):
        model.follow()
    assert GIB // 4 <= model.homes < GIB // 2


def test_the_models_of_a_budget_share_it_by_what_they_can_use(machine: Machine) -> None:
    budget = Budget(host_memory=6 * GIB)
    first = Model(machine, budget, wish=8 * GIB)
    assert first.homes == 6 * GIB
    second = Model(machine, budget, wish=4 * GIB)
    assert second.capacity + first.capacity <= 6 * GIB
    assert second.homes == pytest.approx(2 * GIB, rel=0.05)
    third = Model(machine, budget, wish=4 * GIB)
    assert first.homes + second.homes + third.homes <= 6 * GIB
    assert third.homes == pytest.approx(second.homes, rel=0.05)
    for model in (first, second, third):
        budget.leave(model.seat)
    assert machine.folder.standings() == {}


def test_what_one_model_was_told_is_not_taken_for_another(machine: Machine) -> None:
    budget = Budget(host_memory=6 * GIB)
    first = Model(machine, budget, wish=8 * GIB)
    first.seat.say({HOST: 5 * GIB})
    first.resize({HOST: 5 * GIB})
    second = Model(machine, budget, wish=4 * GIB)
    assert (first.homes, second.homes) == (5 * GIB, GIB)
    for model in (first, second):
        budget.leave(model.seat)


def test_an_idle_model_lends_what_it_keeps_beyond_its_homes(machine: Machine) -> None:
    budget = Budget(host_memory=6 * GIB)
    first, second = Model(machine, budget, wish=4 * GIB), Model(machine, budget, wish=4 * GIB)
    assert first.capacity == second.capacity == 3 * GIB
    for model in (first, second):
        model.homes, model.used = GIB, 3 * GIB  # copies fill the rest
    assert budget.begin(first.seat)
    assert (first.capacity, second.capacity) == (4 * GIB, 2 * GIB)
    first.used = 4 * GIB
    assert budget.begin(second.seat)
    assert (first.capacity, second.capacity) == (2 * GIB, 4 * GIB)
    assert not budget.begin(second.seat)
    assert not budget.targets(first.seat)
    first.is_idle = False
    first.capacity, second.capacity = 3 * GIB, 3 * GIB
    assert not budget.begin(second.seat)  # nothing is taken from one that runs
    for model in (first, second):
        budget.leave(model.seat)


def test_a_model_that_cannot_go_lower_says_so_and_keeps_what_it_has(machine: Machine) -> None:
    budget = Budget(host_memory=6 * GIB)
    first = Model(machine, budget, wish=6 * GIB, floor=GIB)
    first.floor = 5 * GIB
    first.seat.uses()
    second = Model(machine, budget, wish=4 * GIB)
    assert first.homes >= 5 * GIB
    assert second.capacity <= GIB
    for model in (first, second):
        budget.leave(model.seat)


def test_what_a_user_asks_reaches_the_budget_and_is_answered(machine: Machine, budgets: list[Budget]) -> None:
    model = Model(machine, budgets[0], wish=4 * GIB)
    (name,) = machine.folder.standings()
    asked = Asked.of(host=2 * GIB)
    machine.folder.ask(name, as_text(asked))
    taken = budgets[0].take_asked()
    assert taken == asked
    assert budgets[0].ask(taken.nbytes) == {}
    model.follow()
    assert model.homes == 2 * GIB
    budgets[0].answer(asked, True, "done")
    (standing,) = machine.folder.standings().values()
    assert standing.answer is not None
    assert (standing.answer.id, standing.answer.is_done) == (asked.id, True)
    assert standing.holdings[HOST].floor == room_of(2 * GIB)


@pytest.mark.parametrize(
    ("given", "error"),
    [({"host_memory": 0}, ValueError), ({"disk_memory": "x"}, ValueError), ({"device_memory": 1.5}, TypeError)],
)
def test_sizes_that_make_no_sense_are_refused_by_name(given: dict[str, int], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(given))):
        Budget(**given)


def test_a_budget_tells_what_it_holds() -> None:
    assert repr(Budget(host_memory="8GiB")) == "Budget(host_memory='8.0 GiB')"
    assert repr(Budget()) == "Budget()"

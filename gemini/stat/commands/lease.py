"""``gemini-stat lease``: who holds what of the machine's memory; and asking a run to change what it has."""

import argparse
import time

from gemini.arguments.command_line import option
from gemini.arguments.rules import Real, Size
from gemini.lease.asked import Asked, as_text
from gemini.lease.folder import LeaseFolder
from gemini.lease.machine import Machine, read_machine
from gemini.lease.standing import Standing
from gemini.stat.console import Exit, Usage, console, print_json, remark, show
from gemini.stat.lease_outputs import LeaseAnswer, LeasedMemory, LeaseState, MachineState, SharedMemory
from gemini.stat.text import printable
from gemini.telemetry.discovery import NoRun, find_run
from gemini.telemetry.ranks import read_ranks

HELP = (
    "Shows what each run holds of this machine's memory, what is promised and what is free. With --host, --device or "
    "--disk it asks the run TARGET to take that much from its next step on, and waits for its answer; exits 3 if the "
    "run cannot or does not answer in time."
)
TARGET_HELP = "run folder, run id, process id or lease; nothing: all of them"
_POLL_SECONDS = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("host", "device", "disk"):
        parser.add_argument(
            f"--{name}", type=option(Size()), metavar="SIZE", help=f"bytes of model data on {name}, or 8GiB"
        )
    parser.add_argument(
        "--timeout", type=option(Real(0)), default=60.0, metavar="S", help="seconds to wait for the answer (60)"
    )


def run(options: argparse.Namespace) -> Exit:
    wanted = {name: getattr(options, name) for name in ("host", "device", "disk")}
    if any(nbytes is not None for nbytes in wanted.values()):
        return _ask(options, Asked.of(**wanted))
    machine = read_machine()
    if options.target is not None:
        machine = Machine(_leases_of(options.target, machine), machine.pools)
    if options.json:
        print_json(state(machine))
        return Exit.OK
    from gemini.stat import machine_panel

    out = console(options)
    for line in machine_panel.memories(machine, out.width):
        show(out, line)
    if machine.leases:
        show(out, machine_panel.leases(machine))
    else:
        remark("no run holds a lease")
    return Exit.OK


def state(machine: Machine) -> MachineState:
    """The machine as ``--json`` has it."""
    return MachineState(
        [
            SharedMemory(
                pool.memory,
                pool.limit.name,
                pool.limit.total,
                pool.limit.free,
                pool.promised,
                pool.left_for(""),
                list(pool.members),
            )
            for pool in machine.pools
        ],
        [_state_of(name, standing) for name, standing in machine.leases.items()],
    )


def _state_of(name: str, standing: Standing) -> LeaseState:
    memories = {
        memory: LeasedMemory(each.held, each.used, each.floor, each.wish) for memory, each in standing.holdings.items()
    }
    return LeaseState(
        lease=name,
        job=standing.job,
        program=standing.program,
        pid=standing.pid,
        rank=standing.rank,
        ranks=standing.ranks,
        started_at=standing.started,
        is_waiting=standing.is_waiting,
        memories=memories,
    )


def _leases_of(target: str, machine: Machine) -> dict[str, Standing]:
    """The leases of a run.

    Raises
    ------
    NoRun
        If there is no such run, or it holds none.
    """
    named = {name: s for name, s in machine.leases.items() if target in (name, str(s.pid), s.job)}
    if named:
        return named
    path, _ = find_run(target)
    pids = {view.identity.pid for view in read_ranks(path).views}
    found = {name: standing for name, standing in machine.leases.items() if standing.pid in pids}
    if not found:
        raise NoRun(f"{target} holds no lease on this machine: it is over, or runs elsewhere")
    return found


def _ask(options: argparse.Namespace, asked: Asked) -> Exit:
    if options.target is None:
        raise Usage("name the run that is to change: gemini-stat lease RUN --host 8GiB")
    leases = _leases_of(options.target, read_machine())
    if len(leases) > 1:
        known = ", ".join(f"{name} (rank {s.rank})" if s.ranks > 1 else name for name, s in leases.items())
        raise Usage(f"{options.target} holds {len(leases)} leases: name one of {known}")
    (name, standing) = next(iter(leases.items()))
    folder, end = LeaseFolder(), time.monotonic() + options.timeout
    folder.ask(name, as_text(asked))
    while True:
        found = folder.standings().get(name)
        if found is None:
            return _answer(options, False, "the run has ended", name, standing)
        if found.answer is not None and found.answer.id == asked.id:
            return _answer(options, found.answer.is_done, found.answer.text, name, standing)
        if time.monotonic() >= end:
            text = f"no answer after {options.timeout:g} s: a run follows at its next forward"
            withdrawn = "; it is not asked any longer" if folder.withdraw(name) else "; it is about to"
            return _answer(options, False, text + withdrawn, name, standing)
        time.sleep(_POLL_SECONDS)


def _answer(options: argparse.Namespace, is_done: bool, text: str, name: str, standing: Standing) -> Exit:
    if options.json:
        print_json(LeaseAnswer(is_done, text, name, standing.pid))
    elif is_done:
        print(f"process {standing.pid} has {printable(text)} now")
    else:
        remark(text)
    return Exit.OK if is_done else Exit.NEGATIVE

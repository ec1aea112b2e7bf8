"""What the kernel counts while programs wait for memory."""

from pathlib import Path

import pytest

from gemini.lease.pressure import Counters, PressureGauge, is_pressure

PSI = "some avg10=0.00 avg60=0.00 avg300=0.00 total={}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n"


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_a_tenth_of_the_time_is_pressure_and_less_is_not() -> None:
    assert is_pressure(Counters(5.0), Counters(5.2), 2.0)
    assert not is_pressure(Counters(5.0), Counters(5.1), 2.0)
    assert not is_pressure(Counters(5.0), Counters(5.2), 0.0)


def test_an_event_of_a_limit_is_pressure_whatever_the_time() -> None:
    assert is_pressure(Counters(0.0, 3), Counters(0.0, 4), 100.0)


def test_the_machine_and_each_group_are_asked(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path, "proc/pressure/memory", PSI.format(1_000_000))
    write(tmp_path, "sys/fs/cgroup/a/memory.pressure", PSI.format(3_000_000))
    write(tmp_path, "sys/fs/cgroup/a/memory.events", "low 0\nhigh 4\nmax 1\noom 0\n")
    write(tmp_path, "sys/fs/cgroup/a/b/memory.events", "low 0\nhigh 2\nmax 0\n")
    assert Counters.read(tmp_path) == Counters(3.0, 7)


def test_a_machine_that_counts_nothing_has_no_pressure(tmp_path: Path) -> None:
    assert Counters.read(tmp_path) == Counters()
    gauge = PressureGauge(tmp_path)
    assert not gauge.is_pressed(0.0)
    assert not gauge.is_pressed(1.0)


@pytest.mark.parametrize("file", ["proc/pressure/memory", "sys/fs/cgroup/a/memory.pressure"])
def test_pressure_is_what_came_since_the_last_look(tmp_path: Path, file: str) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/a\n")
    write(tmp_path, file, PSI.format(10_000_000))
    write(tmp_path, "proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 19 kB\n")
    gauge = PressureGauge(tmp_path)
    assert not gauge.is_pressed(0.0)
    write(tmp_path, file, PSI.format(10_500_000))
    assert gauge.is_pressed(1.0)
    assert not gauge.is_pressed(2.0)


def test_stalls_where_much_is_free_have_other_reasons(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 30 kB\n")
    write(tmp_path, "proc/pressure/memory", PSI.format(10_000_000))
    gauge = PressureGauge(tmp_path)
    assert not gauge.is_pressed(0.0)
    write(tmp_path, "proc/pressure/memory", PSI.format(11_000_000))
    assert not gauge.is_pressed(1.0)

"""Parts of the live screen by themselves."""

from stat_runs import GIB

from gemini.stat import panels
from gemini.stat.rates import Link, Rates
from gemini.telemetry.records import DescribedChunk


def chunk(**homes: str) -> DescribedChunk:
    return DescribedChunk(numel=1, used_numel=1, full_bytes=2, homes=homes, home_bytes={}, group="0")


def test_every_optimizer_state_is_counted_where_it_is() -> None:
    chunks = [
        chunk(master="device", exp_avg="device", exp_avg_sq="device", gradient="device"),
        chunk(master="host", exp_avg="host", exp_avg_sq="disk", gradient="host"),
        chunk(master="host", exp_avg="host+disk", exp_avg_sq="disk", gradient="host"),
    ]
    line = panels.homes(chunks, 120).plain
    assert line == (
        " masters: device 1  host 2   states: device 2  host 1  disk 2  host+disk 1   gradients: device 1  host 2"
    )


def test_what_moves_is_apart_from_what_waits_however_long_it_is() -> None:
    gib = float(GIB)
    link = Link(
        source="device", target="device", bytes_per_step=999 * gib, bytes_per_second=999 * gib, ceiling=1000 * gib
    )
    rates = Rates(
        steps=3, step_seconds=1.0, links=(link,), needs={"resident": 1.0}, hit_ratio=1.0, stall_seconds=0.1,
        stall_ratio=0.1, stall_by_tier={}, evictions=0.0, disk_written_per_day=None, risk={},
    )  # fmt: skip
    assert f"{panels.size(link.ceiling)}/s  needs a step" in panels.moves(rates, 140)[0].plain


def test_saved_tensors_have_a_line_where_some_have_left() -> None:
    stats = {
        "activation/leave_count": 8, "activation/hit_count": 9, "activation/late_count": 1, "activation/miss_count": 0,
        "activation/leave_wait_seconds": 0.25, "activation/return_wait_seconds": 0.25, "activation/host_bytes": 0,
        "activation/disk_bytes": GIB, "activation/below_peak_bytes": 2 * GIB,
    }  # fmt: skip
    (line,) = panels.activations(stats, 140)
    for text in (f"disk {panels.size(GIB)}, at most {panels.size(2 * GIB)}", "hit 90", "late 10", "waited"):
        assert text in line.plain
    assert panels.activations({"activation/leave_count": 0}, 140) == []

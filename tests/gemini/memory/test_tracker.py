"""Budgets on made-up /proc and /sys trees, and the meter on the real process."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemini.memory.tracker import NonModelMeter, device_budget, disk_budget, host_budget
from gemini.sizes import format_bytes, parse_bytes

GIB = 1 << 30
NO_LIMIT_V1 = "9223372036854771712"


@pytest.fixture(autouse=True)
def one_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


class Machine:
    """A folder that looks like the root of a machine with 64 GiB of RAM, 32 of them available, and no limits."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {32 << 20} kB\n")
        self.status(data_kib=1 << 20, size_kib=2 << 20)
        self.limits()

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def status(self, data_kib: int, size_kib: int) -> None:
        self.write("proc/self/status", f"Name:\tpython\nVmSize:\t{size_kib} kB\nVmData:\t{data_kib} kB\n")

    def limits(self, data: object = "unlimited", address_space: object = "unlimited") -> None:
        self.write(
            "proc/self/limits",
            "Limit                     Soft Limit           Hard Limit           Units\n"
            f"Max data size             {data!s:<20} unlimited            bytes\n"
            f"Max address space         {address_space!s:<20} unlimited            bytes\n",
        )

    def cgroup_v2(self, path: str, current: int, limit: object = "max", high: object = "max", cache: int = 0) -> None:
        for file, value in (("max", limit), ("high", high), ("current", current)):
            self.write(f"sys/fs/cgroup/{path}/memory.{file}", f"{value}\n")
        self.write(f"sys/fs/cgroup/{path}/memory.stat", f"anon 1\ninactive_file {cache}\nactive_file 7\n")

    def cgroup_v1(self, path: str, usage: int, limit: object = NO_LIMIT_V1, cache: int = 0) -> None:
        folder = f"sys/fs/cgroup/memory/{path}"
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{usage}\n")
        self.write(f"{folder}/memory.stat", f"inactive_file 1\ntotal_inactive_file {cache}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_available_ram_binds_where_there_is_no_limit(machine: Machine) -> None:
    budget = host_budget(0.5, root=machine.root)
    assert budget.bytes == 16 * GIB
    assert budget.source == "50% of available RAM (32.0 GiB of 64.0 GiB)"


def test_a_limit_of_any_parent_group_binds(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/job/step\n")
    machine.cgroup_v2("job/step", current=1 * GIB, limit=30 * GIB)
    machine.cgroup_v2("job", current=2 * GIB, limit=10 * GIB)
    budget = host_budget(1.0, root=machine.root)
    assert budget.bytes == 8 * GIB
    assert budget.source == "100% of cgroup v2 headroom (8.0 GiB of 10.0 GiB)"


def test_a_container_whose_group_path_is_the_hosts_finds_its_limit_at_the_mount(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/docker/0123abc\n")
    machine.cgroup_v2("", current=1 * GIB, limit=5 * GIB)
    assert host_budget(1.0, root=machine.root).bytes == 4 * GIB


def test_memory_high_binds_before_memory_max(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/a\n")
    machine.cgroup_v2("a", current=1 * GIB, limit=20 * GIB, high=7 * GIB)
    assert host_budget(1.0, root=machine.root).bytes == 6 * GIB


def test_inactive_file_cache_counts_as_free(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/a\n")
    machine.cgroup_v2("a", current=6 * GIB, limit=8 * GIB, cache=5 * GIB)
    assert host_budget(1.0, root=machine.root).bytes == 7 * GIB


def test_cgroup_v1_binds_and_its_no_limit_number_does_not(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "5:cpu:/x\n4:memory:/batch/job\n0::/\n")
    machine.cgroup_v1("batch/job", usage=GIB, limit=NO_LIMIT_V1)
    machine.cgroup_v1("batch", usage=3 * GIB, limit=12 * GIB, cache=1 * GIB)
    budget = host_budget(1.0, root=machine.root)
    assert budget.bytes == 10 * GIB
    assert "cgroup v1" in budget.source


@pytest.mark.parametrize(
    ("limits", "free", "name"),
    [({"data": 3 * GIB}, 2 * GIB, "RLIMIT_DATA"), ({"address_space": 6 * GIB}, 4 * GIB, "RLIMIT_AS")],
)
def test_rlimits_bind(machine: Machine, limits: dict[str, int], free: int, name: str) -> None:
    machine.limits(**limits)
    budget = host_budget(1.0, root=machine.root)
    assert budget.bytes == free
    assert f"{name} headroom" in budget.source


def test_a_group_over_its_limit_leaves_nothing(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/a\n")
    machine.cgroup_v2("a", current=9 * GIB, limit=8 * GIB)
    assert host_budget(root=machine.root).bytes == 0


def test_local_ranks_share_the_machine_but_not_their_rlimits(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    machine.limits(data=10 * GIB)
    budget = host_budget(1.0, root=machine.root)
    assert budget.bytes == 8 * GIB  # a quarter of the 32 GiB of RAM is less than the 9 GiB of this process alone
    assert "shared by 4 local ranks" in budget.source
    machine.limits(data=5 * GIB)
    assert host_budget(1.0, root=machine.root).bytes == 4 * GIB


@pytest.mark.parametrize(
    ("headroom", "left", "source"),
    [
        (8 * GIB, 8 * GIB * 4 // 5, "80% of RLIMIT_DATA headroom (8.0 GiB of 9.0 GiB)"),
        (GIB, GIB * 3 // 4, "RLIMIT_DATA headroom (1.0 GiB of 2.0 GiB), less 256.0 MiB for what is not model data"),
        (
            GIB // 4,
            GIB // 16,
            "25% of RLIMIT_DATA headroom (256.0 MiB of 1.2 GiB), the rest for what is not model data",
        ),
    ],
)
def test_a_small_headroom_leaves_a_constant_for_what_is_not_model_data(
    machine: Machine, headroom: int, left: int, source: str
) -> None:
    machine.limits(data=GIB + headroom)
    budget = host_budget(spare_bytes=256 << 20, root=machine.root)
    assert abs(budget.bytes - left) <= 1
    assert budget.source == source


def test_the_constant_is_left_by_each_rank(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    budget = host_budget(spare_bytes=256 << 20, root=machine.root)
    assert budget.bytes == GIB - (256 << 20)
    assert budget.source.endswith("shared by 32 local ranks), less 256.0 MiB per rank for what is not model data")


def test_unreadable_numbers_are_no_limits(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "nonsense\n0::/a\n")
    machine.write("sys/fs/cgroup/a/memory.max", "twelve\n")
    assert host_budget(1.0, root=machine.root).bytes == 32 * GIB


def test_the_real_machine_has_a_budget() -> None:
    budget = host_budget()
    assert 0 < budget.bytes < 1 << 50


def test_a_real_rlimit_is_seen(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (GIB // 2, GIB // 2))

    code = "from gemini.memory.tracker import host_budget; b = host_budget(1.0); print(b.bytes, b.source)"
    child = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True, timeout=60, check=True
    )
    nbytes, _, source = child.stdout.partition(" ")
    assert 0 < int(nbytes) < GIB // 2
    assert "RLIMIT_DATA" in source


@pytest.mark.parametrize("fraction", [0, -1, 1.1])
def test_a_fraction_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        host_budget(fraction)


def test_the_disk_budget_of_a_folder_to_be_made_is_that_of_its_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = disk_budget(tmp_path / "not" / "yet", 0.5)
    assert budget.bytes > 0
    assert "free disk" in budget.source
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert disk_budget(tmp_path, 0.5).bytes < budget.bytes


def test_the_device_budget_of_ram_is_refused() -> None:
    with pytest.raises(ValueError, match="host_budget"):
        device_budget("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_budget_follows_what_is_allocated() -> None:
    before = device_budget("cuda", 1.0)
    held = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    after = device_budget("cuda", 1.0)
    assert before.bytes - after.bytes == pytest.approx(held.nbytes, rel=0.1)
    del held
    assert device_budget("cuda", 1.0).bytes == pytest.approx(before.bytes, rel=0.01)


class FakeProc:
    """/proc/self of a process whose memory the test sets, in bytes. Writing clear_refs does not change the status."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)

    def set(self, now: int, peak: int, files: int = 0) -> None:
        sizes = {"VmHWM": peak, "VmRSS": now, "RssFile": files}
        lines = [f"{name}:\t{nbytes // 1024} kB\n" for name, nbytes in sizes.items()]
        (self.root / "proc/self/status").write_text("".join(lines))


def test_non_model_data_are_the_peak_less_the_baseline_and_the_growth_of_model_data(tmp_path: Path) -> None:
    process = FakeProc(tmp_path)
    meter = NonModelMeter(root=tmp_path)
    process.set(now=10 * GIB, peak=10 * GIB)
    meter.start(model_bytes=4 * GIB)  # so 6 GiB are interpreter and libraries
    process.set(now=12 * GIB, peak=15 * GIB)
    meter.sample(model_bytes=5 * GIB)
    assert meter.last_bytes == meter.peak_bytes == 4 * GIB
    process.set(now=12 * GIB, peak=13 * GIB)
    meter.sample(model_bytes=5 * GIB)
    assert meter.last_bytes == 2 * GIB
    assert meter.peak_bytes == 4 * GIB


def test_pages_of_files_are_not_data(tmp_path: Path) -> None:
    """A first step brings in kernels' code; memory pressure may drop it again."""
    process = FakeProc(tmp_path)
    meter = NonModelMeter(root=tmp_path)
    process.set(now=10 * GIB, peak=10 * GIB, files=2 * GIB)
    meter.start(model_bytes=0)
    process.set(now=11 * GIB, peak=14 * GIB, files=2 * GIB)
    meter.sample(model_bytes=0)
    assert meter.last_bytes == 4 * GIB
    process.set(now=13 * GIB, peak=16 * GIB, files=4 * GIB)  # before the peak or after it: the safe side is after
    meter.sample(model_bytes=0)
    assert meter.last_bytes == 6 * GIB
    process.set(now=13 * GIB, peak=16 * GIB, files=4 * GIB)
    meter.sample(model_bytes=0)
    assert meter.last_bytes == 4 * GIB
    process.set(now=8 * GIB, peak=16 * GIB, files=1 * GIB)
    meter.sample(model_bytes=0)
    assert meter.last_bytes == 7 * GIB


def test_mapped_files_are_not_measured(tmp_path: Path) -> None:
    """The guard of the one above, on a real process: 64 MiB of a file, read through a mapping."""
    file = tmp_path / "file"
    file.write_bytes(bytes(64 << 20))
    meter = NonModelMeter()
    meter.start(0)
    meter.sample(0)
    tensor = torch.from_file(str(file), shared=True, size=64 << 20, dtype=torch.uint8)
    before = meter.last_bytes
    assert int(tensor.sum()) == 0
    meter.sample(0)
    meter.sample(0)
    assert meter.last_bytes - before < 8 << 20


def test_without_a_resettable_peak_the_present_resident_set_stands_in(tmp_path: Path) -> None:
    process = FakeProc(tmp_path)
    (tmp_path / "proc/self/clear_refs").mkdir()  # cannot be written, as in a container that forbids it
    meter = NonModelMeter(root=tmp_path)
    process.set(now=GIB, peak=9 * GIB)
    meter.start()
    assert not meter.exact
    process.set(now=3 * GIB, peak=9 * GIB)
    meter.sample(model_bytes=0)
    assert meter.peak_bytes == 2 * GIB


def test_a_temporary_that_is_gone_before_the_sample_is_measured() -> None:
    meter = NonModelMeter()
    meter.start(0)
    if not meter.exact:
        pytest.skip("the kernel does not let this process reset its peak resident set")
    nbytes = 256 << 20
    temporary = torch.ones(nbytes // 4)
    del temporary
    meter.sample(0)
    assert nbytes * 0.9 < meter.last_bytes < nbytes * 1.2
    meter.sample(0)
    assert meter.last_bytes < nbytes * 0.2
    assert meter.peak_bytes >= nbytes * 0.9


def test_model_data_do_not_count_as_non_model_data() -> None:
    meter = NonModelMeter()
    meter.start(0)
    model = torch.ones(64 << 20)
    meter.sample(model.nbytes)
    assert meter.peak_bytes < model.nbytes * 0.2


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (24 * GIB, 24 * GIB),
        ("24GiB", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("512MB", 512 * 10**6),
        ("1.5GiB", 3 * GIB // 2),
        (" 1.5 gib ", 3 * GIB // 2),
        ("0.3TiB", 3 * (1 << 40) // 10),
        ("7KiB", 7168),
        ("1000", 1000),
        ("10B", 10),
    ],
)
def test_sizes_are_read(text: int | str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e9", "24 Gigs", "24G", "1,5GiB", "nan", "٣GiB", -5])
def test_what_is_no_size_is_refused_with_what_is_accepted(text: int | str) -> None:
    with pytest.raises(ValueError, match="24GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [1.0, True, None, b"1GiB"])
def test_other_types_are_refused(size: object) -> None:
    with pytest.raises(TypeError, match="24GiB"):
        parse_bytes(size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1.5 * GIB, "1.5 GiB"),
        (5000 << 40, "5000.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_are_written(nbytes: float, text: str) -> None:
    assert format_bytes(nbytes) == text


def test_what_other_models_take_meanwhile_is_theirs(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    status = tmp_path / "proc/self/status"
    others = [0]
    meter = NonModelMeter(root=tmp_path, elsewhere=lambda: others[0])
    status.write_text("VmHWM:\t1000 kB\nVmRSS:\t1000 kB\nRssFile:\t0 kB\n")
    meter.start()
    status.write_text("VmHWM:\t1700 kB\nVmRSS:\t1700 kB\nRssFile:\t0 kB\n")
    others[0] = 500 << 10
    meter.sample(0)
    assert meter.last_bytes == 200 << 10

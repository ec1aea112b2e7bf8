"""Telemetry in a folder that others may write to: nothing is written through their links, and all of it is private."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stat_runs import make_run, open_run, stats, wait_until_written
from telemetry_runs import records_of

from gemini.safe_files import NotOurs, make_own_folder, open_own, replace_file
from gemini.stat.cli import main
from gemini.telemetry import record_file
from gemini.telemetry.job import Job
from gemini.telemetry.layout import chunks_file, lock_file, older_records_file, records_file, runs_folder, start_file
from gemini.telemetry.run_folder import make_run_folder

Log = pytest.LogCaptureFixture
NAMES = {
    "run.json": lambda run: run / "run.json",
    "records": lambda run: records_file(run, 0),
    "older records": lambda run: older_records_file(run, 0),
    "start": lambda run: start_file(run, 0),
    "lock": lambda run: lock_file(run, 0),
    "chunks": lambda run: chunks_file(run, 0),
    "draft of run.json": lambda run: run / f".run.json.{os.getpid()}",
    "draft of the start": lambda run: run / f".rank00000.start.json.{os.getpid()}",
    "draft of the chunks": lambda run: run / f".rank00000.chunks.json.{os.getpid()}",
}
PRECIOUS = b"precious\n"


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_link_leads_to_stays_as_it_is(
    name: str, link: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_file, "ROTATE_BYTES", 4096)
    run, target = tmp_path / "run", tmp_path / "precious"
    run.mkdir()
    run.chmod(0o777)
    target.write_bytes(PRECIOUS)
    target.chmod(0o644)
    link(target, NAMES[name](run))
    make_run_in(run)
    assert target.read_bytes() == PRECIOUS
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


@pytest.mark.parametrize("name", NAMES)
def test_no_file_is_made_where_a_link_leads(name: str, tmp_path: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "to be made"
    run.mkdir()
    NAMES[name](run).symlink_to(target)
    make_run_in(run)
    assert not target.exists()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    os.mkfifo(NAMES[name](run))
    make_run_in(run)


def test_why_telemetry_is_off_is_said(tmp_path: Path, caplog: Log) -> None:
    run = tmp_path / "run"
    run.mkdir()
    records_file(run, 0).symlink_to(tmp_path / "x")
    writer = open_off(run)
    assert writer is None
    assert "telemetry is off" in caplog.text
    assert "link" in caplog.text


def test_folders_and_files_are_private_whatever_the_umask(open_umask: None, tmp_path: Path) -> None:
    for run in (make_run(), make_run(folder=tmp_path / "chosen" / "run")):
        assert stat.S_IMODE(run.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in run.iterdir()} == {0o600}
    state = runs_folder().parent
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (state, runs_folder())] == [0o700, 0o700]


def test_a_folder_that_is_put_in_the_place_of_the_run_gets_nothing(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    writer = open_run(folder=run)
    run.rename(tmp_path / "moved")
    run.symlink_to(elsewhere)
    writer.record_step(stats(13))
    wait_until_written(writer)
    writer.write_document(chunks_file, stats_document)
    writer.close("finished")
    assert list(elsewhere.iterdir()) == []
    run.unlink()
    assert records_of(tmp_path / "moved")[-1]["type"] == "end"


@pytest.mark.parametrize("run_id", ["../x", "/tmp/x", "..", ".", ".x", "", "a/b", "a\0b", "a\nb", "x" * 5000, "é"])
def test_a_name_of_a_run_does_not_escape(run_id: str, tmp_path: Path, caplog: Log) -> None:
    with pytest.raises(ValueError, match="no name of a run"):
        make_run_folder(None, run_id)
    with pytest.raises(ValueError, match="no name of a run"):
        make_run_folder(tmp_path / "chosen", run_id)
    assert not runs_folder().exists()


def test_a_textfile_stays_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = make_run(), tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    text = (run / "run.json").read_text().replace(run.name, "../../escaped\\u001b/x")
    (run / "run.json").write_text(text)
    start_file(run, 0).unlink()
    records_file(run, 0).write_text(records_file(run, 0).read_text().replace(run.name, "../../escaped\\u001b/x"))
    assert main(["export", str(run), "--format", "prom", "--textfile", str(folder)]) == 0
    (made,) = folder.iterdir()
    assert made.name.startswith("gemini_memory_") and made.suffix == ".prom"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b"]
    capsys.readouterr()


def test_exports_and_reports_replace_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, target = make_run(), tmp_path / "precious"
    target.write_bytes(PRECIOUS)
    for name, command in {"x.csv": ["export", "--format", "csv"], "x.html": ["report"]}.items():
        out = tmp_path / name
        out.symlink_to(target)
        (tmp_path / f".{name}.{os.getpid()}").symlink_to(target)
        assert main([*command, str(run), "-o", str(out)]) == 0
        assert not out.is_symlink()
        assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~umask()
        assert target.read_bytes() == PRECIOUS
    capsys.readouterr()


def test_a_link_of_another_user_is_no_folder_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    make_own_folder(link)  # this user's own links are as good as folders
    if os.geteuid() == 0:
        os.lchown(link, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(NotOurs):
        make_own_folder(link / "below", ours=2)
    assert list(folder.iterdir()) == []


def test_a_state_folder_that_all_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(NotOurs):
        make_own_folder(folder)


def test_a_file_of_another_user_is_not_appended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(PRECIOUS)
    os.close(open_own(file, os.O_WRONLY | os.O_APPEND))
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    with pytest.raises(NotOurs):
        open_own(file, os.O_WRONLY | os.O_APPEND)


def test_a_full_disk_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError):
        replace_file(tmp_path / "x", b"1")  # a folder is there
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def make_run_in(run: Path) -> None:
    """All that a run writes, with rotation; or nothing where telemetry is refused."""
    from gemini.telemetry.records import ChunkMap
    from gemini.telemetry.writer import TelemetryWriter

    writer = TelemetryWriter(run, Job(), min_interval_seconds=0)
    for step in range(1, 20):
        writer.record_step(stats(step))
    writer.write_document(chunks_file, lambda: ChunkMap("1d"))
    writer.close("finished")


def open_off(run: Path) -> Path | None:
    from gemini.telemetry.writer import TelemetryWriter

    return TelemetryWriter(run, Job()).run_dir


def stats_document():  # type: ignore[no-untyped-def]
    from gemini.telemetry.records import ChunkMap

    return ChunkMap("64h")


def umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before

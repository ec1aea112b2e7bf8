"""Tests in processes of their own: what happens there is told here, whatever it is."""

import os
import subprocess
import sys
from pathlib import Path

CONFTEST = "from own_process import pytest_collection_modifyitems, pytest_runtest_protocol, pytest_unconfigure\n"
TESTS = """
import os, time, pytest
pytestmark = pytest.mark.own_process(COLOUR="red")
def test_elsewhere(): assert os.environ["COLOUR"] == "red" and os.environ["PARENT"] != str(os.getpid())
def test_wrong(): assert [1] == [2]
def test_skipped(): pytest.skip("no reason")
@pytest.mark.timeout(1)
def test_slow(): time.sleep(60)
def test_dies(): os._exit(3)
def test_after_that(): pass
"""


def test_results_of_tests_in_another_process_are_told_in_this_one(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST + "import os\nos.environ.setdefault('PARENT', str(os.getpid()))\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntimeout = 60\nmarkers = own_process: elsewhere\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-rs", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        timeout=120,
    )
    told = {
        line.split("::")[1].split()[0]: line.split("::")[1].split()[1]
        for line in run.stdout.splitlines()
        if "::" in line and "%]" in line
    }
    assert told == {
        "test_elsewhere": "PASSED",
        "test_wrong": "FAILED",
        "test_skipped": "SKIPPED",
        "test_slow": "FAILED",
        "test_dies": "FAILED",
        "test_after_that": "PASSED",
    }, run.stdout + run.stderr
    assert "assert [1] == [2]" in run.stdout and "no reason" in run.stdout
    assert "Timeout (>1.0s)" in run.stdout and "it ended in the test (status 3)" in run.stdout

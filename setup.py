"""Bundles the charts of gemini-stat's page while a wheel is built; everything else is said in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SCRIPT = ROOT / "scripts" / "build-web"
CHARTS = ROOT / "gemini" / "stat" / "web" / "vendor" / "uPlot.LICENSE.txt"  # what the script puts there last
NPM_SECONDS = 180


def why_no_charts() -> str | None:
    """Bundle the charts unless they are there; returns what stood in the way, or None."""
    if CHARTS.exists():
        return None
    if not SCRIPT.exists() or shutil.which("bash") is None:
        return "scripts/build-web cannot run here"
    if shutil.which("npm") is None:
        return "npm is not installed"
    try:
        done = subprocess.run(["bash", str(SCRIPT)], stdin=subprocess.DEVNULL, stdout=sys.stderr, timeout=NPM_SECONDS)
    except subprocess.TimeoutExpired:
        return f"scripts/build-web took more than {NPM_SECONDS} s"
    return f"scripts/build-web failed with status {done.returncode}" if done.returncode else None


class BuildWithCharts(build_py):
    """A wheel without charts is complete otherwise (the page shows tables), so nothing here fails the build."""

    def run(self) -> None:
        if not self.editable_mode:
            reason = why_no_charts()
            self.__dict__.pop("data_files", None)  # listed before the charts were there, perhaps
            if reason:
                print(f"gemini-memory: this wheel has no charts (gemini-stat shows tables): {reason}", file=sys.stderr)
        super().run()


setup(cmdclass={"build_py": BuildWithCharts})

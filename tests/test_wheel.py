"""What pip installs is whole: built in a copy of the sources, imported away from them."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD_FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "gemini", "chunk", "lazy")


def run(*arguments: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_sources(target: Path) -> None:
    """A build leaves folders behind, and picks up what an earlier one left: it gets a copy."""
    for name in BUILD_FILES:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(path, target / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(path, target / name)


def build(source: Path, **environment: str) -> tuple[Path, str]:
    """The wheel, and what the build said. No isolation: needs no network. The hook is what pip and build call, too."""
    code = "import setuptools.build_meta as b; print('WHEEL', b.build_wheel('dist'))"
    (source / "dist").mkdir()
    output = run("-c", code, cwd=source, **environment)
    (built,) = (source / "dist").glob("*.whl")
    return built, output


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what is in the source tree: without scripts/build-web nothing is fetched."""
    source = tmp_path_factory.mktemp("source")
    copy_sources(source)
    return build(source)[0]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel's content in it. A wheel is a zip file: unpacking is installing."""
    target = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def expected_files() -> set[str]:
    files = set()
    for top, prefix in (("gemini", ""), ("chunk", "gemini/"), ("lazy", "gemini/")):
        for file in (ROOT / top).rglob("*"):
            relative = file.relative_to(ROOT)
            linked = relative.parts[:2] in (("gemini", "chunk"), ("gemini", "lazy"))
            ships = file.suffix in (".py", ".json", ".html", ".js", ".css", ".yml") or file.name == "py.typed"
            if (ships or "vendor" in relative.parts) and not linked and file.is_file():
                files.add(prefix + relative.as_posix())
    return files


def test_every_file_of_the_source_tree_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected_files() - names == set()
    assert {"gemini/py.typed", "gemini/chunk/__init__.py", "gemini/lazy/__init__.py"} <= names


def test_nothing_else_is_in_the_wheel(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names - expected_files() == set()


def test_the_licence_and_the_command_are_in_the_wheel(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    by_end = {name.split(".dist-info/", 1)[1]: name for name in archive.namelist() if ".dist-info/" in name}
    assert "licenses/LICENSE" in by_end
    assert b"gemini-stat = gemini.stat.cli:main" in archive.read(by_end["entry_points.txt"])


def test_every_documented_module_can_be_imported_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import gemini, gemini.lazy, gemini.chunk, gemini.booster.plugin, gemini.nn.optimizer, gemini.stat.cli\n"
        "modules = [gemini, gemini.lazy, gemini.chunk, gemini.booster.plugin, gemini.nn.optimizer]\n"
        f"assert all(m.__file__.startswith({str(installed)!r}) for m in modules), [m.__file__ for m in modules]\n"
        "[getattr(gemini, name) for name in gemini.__all__]\n"
    )
    run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed))


def test_gemini_stat_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    output = run("-m", "gemini.stat", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert output.startswith("gemini-stat ")


CHARTS = {f"gemini/stat/web/vendor/{name}" for name in ("uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE.txt")}
FAKE_NPM = """#!/bin/sh
mkdir -p node_modules/uplot/dist
for name in dist/uPlot.iife.min.js dist/uPlot.min.css LICENSE; do echo fetched > node_modules/uplot/$name; done
"""


@pytest.fixture
def bare_source(tmp_path: Path) -> Path:
    """The sources as they are committed, without charts."""
    source = tmp_path / "source"
    source.mkdir()
    copy_sources(source)
    shutil.rmtree(source / "gemini/stat/web/vendor", ignore_errors=True)
    (source / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/build-web", source / "scripts/build-web")
    return source


def path_with_npm(folder: Path, npm: str) -> str:
    folder.mkdir()
    (folder / "npm").write_text(npm)
    (folder / "npm").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_a_build_bundles_the_charts_where_npm_is(bare_source: Path, tmp_path: Path) -> None:
    built, output = build(bare_source, PATH=path_with_npm(tmp_path / "bin", FAKE_NPM))
    assert CHARTS <= set(zipfile.ZipFile(built).namelist())
    assert "no charts" not in output


def test_a_build_whose_npm_fails_says_so_and_goes_on(bare_source: Path, tmp_path: Path) -> None:
    built, output = build(bare_source, PATH=path_with_npm(tmp_path / "bin", "#!/bin/sh\nexit 7\n"))
    assert not CHARTS & set(zipfile.ZipFile(built).namelist())
    assert "this wheel has no charts" in output and "status 7" in output


def test_a_build_without_npm_says_so_and_goes_on(bare_source: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    bash = shutil.which("bash")
    assert bash is not None
    (tmp_path / "bin/bash").symlink_to(bash)
    built, output = build(bare_source, PATH=str(tmp_path / "bin"))
    assert not CHARTS & set(zipfile.ZipFile(built).namelist())
    assert "npm is not installed" in output

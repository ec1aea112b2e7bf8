"""The files of the page, and whether charts were built in."""

from importlib.resources import files

OURS = ("index.html", "app.js", "style.css")
CHARTS = ("vendor/uPlot.iife.min.js", "vendor/uPlot.min.css")
"""Third-party code: not in the sources, bundled by scripts/build-web, and then part of the wheel with its licence."""
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}


def content(name: str) -> bytes:
    """One file; empty for a part of the charts that was not built in.

    Raises
    ------
    KeyError
        There is no such file.
    """
    if name not in OURS + CHARTS:
        raise KeyError(name)
    file = files("gemini.stat").joinpath("web", *name.split("/"))
    if name in CHARTS and not file.is_file():
        return b""
    return file.read_bytes()


def has_charts() -> bool:
    return all(content(name) for name in CHARTS)

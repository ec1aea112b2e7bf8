"""``gemini-stat report``: the page of a run as one file that needs no server and no network."""

import argparse
import base64
import hashlib
import time
from pathlib import Path

from gemini.arguments.command_line import option
from gemini.arguments.places import Name
from gemini.safe_files import USERS_FILE, replace_file
from gemini.stat import page_data, web_files
from gemini.stat.console import Exit, Usage, as_text, find, print_json, remark
from gemini.stat.follow import Follower
from gemini.stat.outputs import Report
from gemini.stat.screen import Shown
from gemini.stat.text import file_name

HELP = "Writes the run as one HTML file that works offline."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        type=option(Name()),
        metavar="FILE",
        help="default: gemini-stat-RUN.html in the present folder",
    )


def run(options: argparse.Namespace) -> Exit:
    path = find(options)
    shown = Follower(path, options).look()
    target = options.output or Path(f"gemini-stat-{file_name(shown.run.identity.run_id)}.html")
    page = render(path, shown)
    try:
        replace_file(target, page.encode(), mode=USERS_FILE)
    except OSError as error:
        raise Usage(f"{target} cannot be written: {error}") from error
    if options.json:
        nbytes = len(page.encode())
        print_json(Report(shown.run.identity.run_id, shown.run.rank, str(target), nbytes, web_files.has_charts()))
    else:
        print(target)
        if not web_files.has_charts():
            remark("tables only; scripts/build-web builds the charts")
    return Exit.OK


def render(path: Path, shown: Shown) -> str:
    """The page with its data, style and code inside, and a policy that lets nothing else run or load."""
    content = {
        **page_data.snapshot(shown),
        "timeline": page_data.timeline(shown),
        "chunks": page_data.chunks(shown),
        "steps": page_data.steps(path, shown.run.rank),
        "made_at": time.time(),
    }
    # The one thing that could end a script element is "</", and "<!--" could confuse its end: neither is left in JSON.
    data = as_text(content).replace("<", "\\u003c")
    text = {name: web_files.content(name).decode() for name in web_files.OURS + web_files.CHARTS}
    scripts = [text[name] for name in ("vendor/uPlot.iife.min.js", "app.js") if text[name]]
    styles = [text[name] for name in ("vendor/uPlot.min.css", "style.css") if text[name]]
    sources = f"script-src {_hashes(scripts)}; style-src {_hashes(styles)}"
    policy = f"default-src 'none'; {sources}; img-src data:; base-uri 'none'"
    head, rest = text["index.html"].split('<link rel="icon"', 1)
    _, rest = rest.split("</head>", 1)
    body, _ = rest.split('<script src="vendor/', 1)
    return "".join(
        [
            head,
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            *(f"<style>{style}</style>\n" for style in styles),
            "</head>",
            body,
            f'<script type="application/json" id="data">{data}</script>\n',
            *(f"<script>{script}</script>\n" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def _hashes(texts: list[str]) -> str:
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)

"""``gemini-stat serve``: the web page of a run, on this machine."""

import argparse
import sys
import threading
import webbrowser

from gemini.arguments.command_line import option
from gemini.arguments.rules import Whole
from gemini.stat import web_files
from gemini.stat.console import Exit, Usage, find, print_json_line
from gemini.stat.outputs import Address
from gemini.stat.server import Server, address_of, token_for

HELP = (
    "Serves the run as a web page, with an API and /metrics, on loopback. From elsewhere: "
    "ssh -L 8765:localhost:8765 HOST. Ctrl-C ends it."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; not loopback: asks for a token")
    parser.add_argument("--port", type=option(Whole(0, 65535)), default=8765, help="0 takes a free one (8765)")
    parser.add_argument("--token", action="store_true", help="ask for a token on loopback, too")
    parser.add_argument("--all-users", action="store_true", help="other users of this machine need no token")
    parser.add_argument("--open", action="store_true", help="open it in a browser")


def run(options: argparse.Namespace) -> Exit:
    path = find(options)
    try:
        token = token_for(options.host, options.token)
        server = Server((options.host, options.port), path, options, token, options.all_users)
    except (OSError, OverflowError) as error:
        raise Usage(f"cannot listen on {options.host}:{options.port}: {error}; --port 0 takes a free one") from error
    address = address_of(server)
    if options.json:
        print_json_line(Address(address, web_files.has_charts()))
    else:
        print(address, flush=True)
        if not web_files.has_charts():
            print("gemini-stat: tables only; scripts/build-web builds the charts", file=sys.stderr)
    if options.open:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    try:
        server.serve_forever(poll_interval=0.2)
    finally:
        server.is_closing.set()
        server.server_close()
    return Exit.OK

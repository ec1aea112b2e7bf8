"""The web page and its API on a loopback address: read-only, GET and HEAD only, nothing from elsewhere.

A page in the user's browser may reach loopback too: therefore the Host header must be one of ours (DNS rebinding), the
content security policy lets nothing else in, and an address that others can reach asks for a token. So may other users
of the machine: a connection that is not of this user or root is refused, unless it shows the token.
"""

import argparse
import hmac
import io
import json
import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from gemini.stat import page_data, web_files
from gemini.stat.connections import Connections, RequestReader, RequestTooLong
from gemini.stat.console import as_text
from gemini.stat.follow import Follower
from gemini.stat.peers import is_of_this_user
from gemini.stat.requests import LONGEST_LINE, METHODS, Target, fault_of, refusal, target_of
from gemini.stat.screen import Shown
from gemini.stat.sight import ALL, WORST
from gemini.telemetry.discovery import NoRun
from gemini.telemetry.files import Unreadable
from gemini.telemetry.layout import chunks_file
from gemini.telemetry.ranks import read_ranks
from gemini.telemetry.starts import ranks_of

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_COOKIE = "gemini_memory_token"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_EVENT_SECONDS = 1.0
_MAX_STREAMS = 64
_MAX_CONNECTIONS = 128
_MAX_READING = 4
"""Requests that read files at a time; others wait."""
_READING_SECONDS = 20.0
_LEFT_OVER_BYTES = 1 << 20


class Server(ThreadingHTTPServer):
    """Serves one run.

    Parameters
    ----------
    address
        Host and port; port 0 takes a free one.
    path, options
        The run, and the options of the command.
    token
        What a client must show; None: nothing (loopback).
    is_for_all_users
        Other users of this machine may look, too.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = _MAX_CONNECTIONS

    def __init__(
        self,
        address: tuple[str, int],
        path: Path,
        options: argparse.Namespace,
        token: str | None,
        is_for_all_users: bool = False,
    ) -> None:
        super().__init__(address, Handler)
        self.path = path
        self.options = options
        self.token = token
        self.streams = threading.BoundedSemaphore(_MAX_STREAMS)
        self.is_closing = threading.Event()
        host, port = address[0], self.server_address[1]
        names = {*_LOOPBACK, host} if host in _LOOPBACK else {host}
        self.hosts = {f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name in names}
        self.hosts = self.hosts if host in _LOOPBACK else set()
        self.checks_user = host in _LOOPBACK and token is None and not is_for_all_users
        self.connections = Connections(_MAX_CONNECTIONS)
        self.reading = threading.BoundedSemaphore(_MAX_READING)

    def look(self, rank: str | None) -> Shown:
        options = argparse.Namespace(**{**vars(self.options), "rank": rank or self.options.rank})
        return Follower(self.path, options).look()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer on a thread of its own, unless there are too many already."""
        if self.connections.admit(request):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        self.connections.leave(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nothing to report."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # not 0.9, whose answers have no headers
    server_version = "gemini-stat"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self._requests = RequestReader(self.connection)
        self.rfile = io.BufferedReader(self._requests)
        self._is_answered = False

    def handle_one_request(self) -> None:
        """Read one request and answer it; what is too slow, too long or gone ends the connection."""
        self._requests.begin()
        self._is_answered = False
        self.server.connections.wait(self.connection)
        try:
            self.raw_requestline = self.rfile.readline(LONGEST_LINE + 1)
            if not self.raw_requestline:
                self.close_connection = True
            elif (status := fault_of(self.raw_requestline)) is not None:
                self.command, self.requestline, self.request_version = "", "", "HTTP/1.0"
                self.send_error(status)
            elif self.parse_request():
                self.server.connections.serve(self.connection)
                self._answer()
            self.wfile.flush()
        except (OSError, RequestTooLong):
            self.close_connection = True

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin an answer, which has headers also for those who ask as in HTTP/0.9."""
        if self.request_version == "HTTP/0.9":
            self.request_version = "HTTP/1.0"
        super().send_response(code, message)

    def handle_expect_100(self) -> bool:
        """There is no body to be waited for."""
        return True

    def finish(self) -> None:
        """Take what the client has sent beyond its request: else the system throws our answer away with it."""
        try:
            self.wfile.flush()
            self.connection.setblocking(False)
            left = _LEFT_OVER_BYTES
            while left > 0 and (some := self.connection.recv(1 << 16)):
                left -= len(some)
        except OSError:
            pass
        super().finish()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self._error(HTTPStatus(code), HTTPStatus(code).phrase)

    def _answer(self) -> None:
        target = target_of(self.path)
        if (refused := refusal(self.command, self.headers, self.server.hosts)) is not None:
            self._error(*refused)
        elif target is None:
            self._error(HTTPStatus.BAD_REQUEST, "no path on this server")
        elif self.server.checks_user and not is_of_this_user(self.connection):
            self._error(HTTPStatus.FORBIDDEN, "this is another user's page: gemini-stat serve --token or --all-users")
        elif not self._may_enter(target.query):
            self._error(HTTPStatus.UNAUTHORIZED, "open the address that gemini-stat serve printed, or send its token")
        elif "token" in target.query and self.server.token is not None:
            self._exchange()
        else:
            self._route(target)

    def _may_enter(self, query: dict[str, str]) -> bool:
        if self.server.token is None:
            return True
        shown = [query.get("token", ""), self.headers.get("Authorization", "").removeprefix("Bearer ")]
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
        except CookieError:
            cookie = None
        if cookie is not None:
            shown.append(cookie.value)
        return any(hmac.compare_digest(value.encode(), self.server.token.encode()) for value in shown)

    def _exchange(self) -> None:
        """The token leaves the address line: into a cookie that other sites cannot send along."""
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", "/")
        self.send_header("Set-Cookie", f"{_COOKIE}={self.server.token}; HttpOnly; SameSite=Strict; Path=/")
        self._common_headers("text/plain")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _route(self, target: Target) -> None:
        path, query = target
        name = "index.html" if path == "/" else path.removeprefix("/")
        routes: dict[str, Callable[[dict[str, str]], None]] = {
            "healthz": lambda _: self._send(b"ok\n", "text/plain"),
            "metrics": self._metrics,
            "api/v1/snapshot": lambda q: self._json(page_data.snapshot(self.server.look(q.get("rank")))),
            "api/v1/timeline": lambda q: self._json(page_data.timeline(self.server.look(q.get("rank")))),
            "api/v1/chunks": lambda q: self._json({"chunks": page_data.chunks(self.server.look(q.get("rank")))}),
            "api/v1/steps": self._steps,
            "api/v1/events": self._events,
        }
        try:
            rank = query.get("rank", ALL)
            if rank not in (ALL, WORST) and not (rank.isascii() and rank.isdecimal() and len(rank) < 6):
                self._error(HTTPStatus.BAD_REQUEST, "rank must be a number, all or worst")
            elif name in ("api/v1/events", "healthz"):
                routes[name](query)
            elif name in routes:
                self._one_of_few(routes[name], query)
            else:
                self._send(web_files.content(name), web_files.TYPES[name.rsplit(".", 1)[1]])
        except KeyError:
            self._error(HTTPStatus.NOT_FOUND, "no such page")
        except (Unreadable, NoRun) as error:
            self._error(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except OSError:
            raise  # the client is gone
        except Exception as error:  # no client may end a connection without an answer, whatever the run's files say
            self._error(HTTPStatus.INTERNAL_SERVER_ERROR, f"internal error: {type(error).__name__}")

    def _one_of_few(self, answer: Callable[[dict[str, str]], None], query: dict[str, str]) -> None:
        """Answer when not too many others read files already."""
        if not self.server.reading.acquire(timeout=_READING_SECONDS):
            self._error(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at a time")
            return
        try:
            answer(query)
        finally:
            self.server.reading.release()

    def _steps(self, query: dict[str, str]) -> None:
        text = query.get("max_points", "")
        points = min(int(text), 4096) if text.isascii() and text.isdecimal() and len(text) < 6 else page_data.MAX_POINTS
        shown = self.server.look(query.get("rank"))
        self._json(page_data.steps(self.server.path, shown.run.rank, max(2, points)))

    def _metrics(self, query: dict[str, str]) -> None:
        try:
            from gemini.stat.metrics import CONTENT_TYPE, exposition
        except ImportError:
            self._error(HTTPStatus.NOT_IMPLEMENTED, "pip install 'gemini-memory[metrics]' for Prometheus metrics")
            return
        runs = read_ranks(self.server.path).views
        self._send(exposition(lambda: runs), CONTENT_TYPE)

    def _events(self, query: dict[str, str]) -> None:
        """Server-sent events: a message a second while something is new, a comment otherwise, so that both sides
        notice when the other is gone."""
        if not self.server.streams.acquire(blocking=False):
            self._error(HTTPStatus.SERVICE_UNAVAILABLE, f"{_MAX_STREAMS} pages look already")
            return
        try:
            self.send_response(HTTPStatus.OK)
            self._common_headers("text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self._is_answered = self.close_connection = True
            before = b""
            while self.command == "GET" and not self.server.is_closing.is_set():
                message = self._message(query.get("rank"))
                self.wfile.write(b": still here\n\n" if message == before else b"data: " + message + b"\n\n")
                self.wfile.flush()
                before = message
                self.server.is_closing.wait(_EVENT_SECONDS)
        finally:
            self.server.streams.release()

    def _message(self, wanted: str | None) -> bytes:
        try:
            shown = self.server.look(wanted)
        except (Unreadable, NoRun) as error:
            return json.dumps({"error": str(error)}).encode()
        content = page_data.snapshot(shown)
        content["row"] = {name: value for name, value in asdict(content["row"]).items() if name != "t"}  # no news
        content["ranks"] = ranks_of(self.server.path)
        rank = shown.run.rank
        content["timeline_stamp"] = None if shown.timeline is None else f"{rank}/{shown.timeline.step}"
        content["chunk_stamp"] = f"{rank}/{_stamp(chunks_file(self.server.path, rank))}"
        return as_text(content, separators=(",", ":")).encode()

    def _json(self, content: Any) -> None:
        self._send(as_text(content).encode(), "application/json")

    def _error(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True
        if not self._is_answered:
            self._send(json.dumps({"error": text}).encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self._common_headers(kind)
        self.send_header("Content-Length", str(len(body)))
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", ", ".join(METHODS))
        if self.close_connection:
            self.send_header("Connection", "close")
        self._is_answered = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _common_headers(self, kind: str) -> None:
        self.send_header("Content-Type", kind if ";" in kind else f"{kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cache-Control", "no-store")

    def log_message(self, format: str, *args: Any) -> None:
        """Log no requests."""


def _stamp(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def token_for(host: str, wanted: bool) -> str | None:
    """A fresh token where others can reach the address, or where one is wanted."""
    return secrets.token_urlsafe(24) if wanted or host not in _LOOPBACK else None


def address_of(server: Server) -> str:
    """What to open in a browser."""
    host, port = str(server.server_address[0]), server.server_address[1]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"?token={server.token}" if server.token else "")

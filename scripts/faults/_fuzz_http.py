"""Mutated requests to the page's server: each is answered or hung up on, and the server goes on."""

import random
import socket
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "gemini" / "checkpoint"))

from mutations import BYTES
from served_run import Served
from stat_runs import make_run

from gemini.stat import connections

PATHS = (
    "/", "/app.js", "/healthz", "/metrics", "/api/v1/snapshot?rank=0", "/api/v1/timeline", "/api/v1/chunks",
    "/api/v1/steps?max_points=5", "/nothing", "/..%2f..%2fetc/passwd", "/?token=x",
)  # fmt: skip
LINES = (
    "Accept: */*", "Cookie: gemini_memory_token=x", "Authorization: Bearer x", "Origin: http://evil.example",
    "Content-Length: 5", "Transfer-Encoding: chunked", "Range: bytes=0-5", "Expect: 100-continue", "Connection: close",
    "Connection: keep-alive", "Sec-Fetch-Site: cross-site", "Upgrade: websocket", "X: " + "y" * 500,
)  # fmt: skip
METHODS = ("GET", "GET", "GET", "HEAD", "POST", "OPTIONS", "TRACE", "PRI")
TOKENS = (
    b"\r\n",
    b"\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b"%",
    b"%00",
    b"..",
    b"HTTP/1.1",
    b"\xff" * 8,
    b"A" * 9000,
    b"?",
    b"&",
)
CHECKED_EVERY = 10
SECONDS = 10.0


class Judge:
    """One input after the other: what a client sends on one connection."""

    def __init__(self, folder: Path, current: Path, rng: random.Random) -> None:
        self._rng, self._current = rng, current
        connections._HEAD_SECONDS = 0.2
        self._served = Served(make_run())
        self._tried = 0

    def try_one(self) -> tuple[str, str, bool]:
        """What was done, what came of it, and whether that must not be."""
        requests = [self._request() for _ in range(self._rng.choice((1, 1, 1, 2, 5)))]
        data, mutation = b"".join(requests), "as it is"
        for _ in range(self._rng.choice((0, 1, 1, 2, 4))):
            mutation = self._rng.choice((*BYTES, "a token"))
            if not data:
                break
            data = self._with_token(data) if mutation == "a token" else BYTES[mutation](self._rng, data, requests[0])
        self._current.write_bytes(data)
        outcome, is_bad = self._outcome(data)
        self._tried += 1
        if not is_bad and self._tried % CHECKED_EVERY == 0:
            outcome, is_bad = self._goes_on(outcome)
        return mutation, outcome, is_bad

    def _request(self) -> bytes:
        rng = self._rng
        lines = [f"{rng.choice(METHODS)} {rng.choice(PATHS)} HTTP/1.1", f"Host: 127.0.0.1:{self._served.port}"]
        lines += rng.sample(LINES, rng.randrange(4))
        return "\r\n".join([*lines, "", ""]).encode()

    def _with_token(self, data: bytes) -> bytes:
        at = self._rng.randrange(len(data))
        return data[:at] + self._rng.choice(TOKENS) + data[at + self._rng.randrange(4) :]

    def _outcome(self, data: bytes) -> tuple[str, bool]:
        answer = b""
        try:
            with socket.create_connection(("127.0.0.1", self._served.port), SECONDS) as client:
                try:
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)
                except TimeoutError:
                    raise
                except OSError:
                    pass  # the server has answered what came first, and hung up
                with suppress(ConnectionError):
                    while more := client.recv(1 << 16):
                        answer += more
        except TimeoutError:
            return "no end of an answer", True
        if b"root:" in answer:
            return "a file of the system", True
        if not answer:
            return "hung up on", False
        if not answer.startswith(b"HTTP/1.1 ") or b"Content-Security-Policy: " not in answer:
            return f"an answer without its headers: {answer[:100]!r}", True
        status = answer[9:12].decode(errors="replace")
        return f"status {status}", status == "500"

    def _goes_on(self, outcome: str) -> tuple[str, bool]:
        try:
            status, _, body = self._served.request("/healthz")
        except OSError as error:
            return f"the server is gone: {type(error).__name__}", True
        return (outcome, False) if (status, body) == (200, b"ok\n") else (f"health: {status} {body[:50]!r}", True)

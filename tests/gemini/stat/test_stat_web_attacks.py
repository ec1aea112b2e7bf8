"""The page's server under broken, hostile and slow requests: each gets its answer, and the next one is served."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hostile_runs import KINDS, spoil
from served_run import Served
from stat_runs import make_run

from gemini.stat import connections, peers, server
from gemini.stat.server import POLICY
from gemini.telemetry.layout import chunks_file, records_file, timeline_file

SECONDS = 20.0
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        found = Served(make_run())
    yield found
    found.close()


def raw(served: Served, *parts: bytes, reads: bool = True) -> bytes:
    """All that the server answers to these bytes until it ends the connection."""
    with socket.create_connection(("127.0.0.1", served.port), SECONDS) as client:
        with suppress(OSError):
            for part in parts:
                client.sendall(part)
        answer = b""
        with suppress(OSError):
            while reads and (more := client.recv(1 << 16)):
                answer += more
        return answer


def get(served: Served, target: str = "/healthz", *lines: str, method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    host = [] if any(line.lower().startswith("host") for line in lines) else [f"Host: 127.0.0.1:{served.port}"]
    head = "\r\n".join([f"{method} {target} {version}", *host, *lines, "Connection: close", "", ""])
    return head.encode("latin-1", "replace")


def statuses(answer: bytes) -> list[int]:
    return [int(part.split(b" ", 1)[0]) for part in answer.split(b"HTTP/1.1 ")[1:]]


TARGETS: dict[str, int] = {
    **dict.fromkeys(
        [
            "/../../etc/passwd",
            "/..%2f..%2fetc/passwd",
            "/%2e%2e/%2e%2e/etc/passwd",
            "/....//etc/passwd",
            "/..%252f..%252fetc/passwd",
            "/vendor/../server.py",
            "/vendor/%2e%2e/server.py",
            "/server.py",
            "/web/app.js",
            "/app.js/",
            "/app.js%00",
            "/app.js%00.html",
            "/%61pp.js",
            "/APP.JS",
            "/.git/config",
            "/~root",
            "/*",
            "/api/v1/nothing",
            "/api/v1/",
            "/api//v1/snapshot",
            "/\\..\\server.py",
            "/static/..;/server.py",
            "/;x",
            "/index.html.bak",
            "/c:/windows",
            "/proc/self/environ",
            "/run.json",
            "/rank00000.jsonl",
            "/%c0%ae%c0%ae/x",
        ],
        404,
    ),
    **dict.fromkeys(
        [
            "http://evil.example/",
            "http://[",
            "evil.example:443",
            "*",
            "app.js",
            "?rank=0",
            "/\x7f",
            "/\x00",
            "/é",
            "/?" + "&".join(f"a{i}=1" for i in range(100)),
            "/api/v1/snapshot?rank=x",
            "/api/v1/snapshot?rank=-1",
            "/api/v1/snapshot?rank=%D9%A3",
            "/api/v1/snapshot?rank=0%0d%0aX:1",
            "/api/v1/snapshot?rank=999999999",
            "/api/v1/snapshot?rank=../0",
            "/api/v1/snapshot?rank=%00",
        ],
        400,
    ),
    **dict.fromkeys(["//healthz", "/healthz?x=1", "/healthz?%zz", "/healthz?" + "a" * 2000, "/healthz#x"], 200),
    "/" + "a" * 9000: 414,
    "/" + "%41" * 30_000: 414,
    "/" + "a" * 200_000: 414,
}
LINES: dict[str, tuple[list[str], int]] = {
    "another host": (["Host: evil.example"], 421),
    "another port": (["Host: 127.0.0.1:1"], 421),
    "no port": (["Host: localhost"], 421),
    "a host with a user": (["Host: 127.0.0.1@evil.example"], 421),
    "an empty host": (["Host:"], 421),
    "two hosts": (["Host: localhost", "Host: evil.example"], 400),
    "a page of another site": (["Origin: http://evil.example"], 403),
    "a page in a sandbox": (["Origin: null"], 403),
    "another port's page": (["Origin: http://127.0.0.1:1"], 403),
    "a script of another site": (["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"], 403),
    "a frame of another site": (
        ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"],
        403,
    ),
    "another port's script": (["Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: cors"], 403),
    "a link": (["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"], 200),
    "our own script": (["Sec-Fetch-Site: same-origin", "Sec-Fetch-Mode: cors"], 200),
    "a range": (["Range: bytes=0-1"], 200),
    "overlapping ranges": (["Range: bytes=" + ",".join(f"{i}-" for i in range(1000))], 200),
    "an upgrade": (["Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"], 200),
    "an expectation": (["Expect: 100-continue"], 200),
    "another expectation": (["Expect: x"], 200),
    "a body": (["Content-Length: 5"], 400),
    "a negative body": (["Content-Length: -1"], 400),
    "two lengths": (["Content-Length: 0", "Content-Length: 7"], 400),
    "chunks": (["Transfer-Encoding: chunked"], 400),
    "odd chunks": (["Transfer-Encoding: xchunked", "Content-Length: 0"], 400),
    "a name with a blank": (["Content-Length : 5"], 400),
    "a line without a colon": (["nonsense"], 400),
    "a folded line": (["X: a", " b"], 200),
    "a thousand lines": ([f"X{i}: 1" for i in range(1000)], 431),
    "a line of 100 KB": (["X: " + "a" * 100_000], 431),
    "50 lines of 8 KB": ([f"X{i}: " + "a" * 8000 for i in range(50)], 431),
    "a broken cookie": (["Cookie: =;;;\x01=\x02; gemini_memory_token=\xff"], 200),
    "a broken authorization": (["Authorization: Bearer \xff\xfe"], 200),
    "control characters": (["X: \x01\x02\x1b[31m"], 200),
}
BYTES: dict[str, tuple[bytes, list[int]]] = {
    "nothing": (b"", []),
    "an empty line": (b"\r\n\r\n", []),
    "noise": (bytes(range(256)) * 8, [400]),
    "zeros": (b"\0" * 4096 + b"\r\n\r\n", [400]),
    "a TLS greeting": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x11" * 500 + b"\n\n", [400]),
    "a greeting of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),
    "HTTP/0.9": (b"GET /\r\n\r\n", [400]),
    "HTTP/0.9 with POST": (b"POST /\r\n\r\n", [400]),
    "HTTP/0.9 by its number": (b"GET / HTTP/0.9\r\nno header\r\n\r\n", [400]),
    "HTTP/9": (b"GET / HTTP/9.9\r\n\r\n", [505]),
    "no version": (b"GET / HTTP\r\n\r\n", [400]),
    "a huge version": (b"GET / HTTP/" + b"9" * 5000 + b".1\r\n\r\n", [400]),
    "four words": (b"GET / x HTTP/1.1\r\n\r\n", [400]),
    "one word": (b"GET\r\n\r\n", [400]),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", [400]),
    "no host in HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n", [400]),
    "a megabyte without a line": (b"A" * (1 << 20), [414]),
    "SMTP": (b"EHLO evil.example\r\nMAIL FROM:<x>\r\n", [400]),
    "half a request": (b"GET / HTTP/1.1\r\nHost: x", []),
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: ascii(target[:40]))
def test_targets(served: Served, target: str) -> None:
    answer = raw(served, get(served, target))
    assert statuses(answer) == [TARGETS[target]], answer[:300]
    check_headers(answer)
    check_serves(served)


@pytest.mark.parametrize("name", LINES)
def test_headers(served: Served, name: str) -> None:
    lines, status = LINES[name]
    answer = raw(served, get(served, "/healthz", *lines))
    assert statuses(answer) == [status], answer[:300]
    check_headers(answer)
    check_serves(served)


@pytest.mark.parametrize("name", BYTES)
def test_bytes(served: Served, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_HEAD_SECONDS", 1.0)
    content, wanted = BYTES[name]
    answer = raw(served, content)
    assert statuses(answer) == wanted, answer[:300]
    if wanted:
        check_headers(answer)
    check_serves(served)


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "get", "GET\x0b", "X" * 999]
)
def test_other_methods_are_refused(served: Served, method: str) -> None:
    answer = raw(served, get(served, "/", method=method))
    assert statuses(answer) in ([405], [400])
    assert b"TRACE" not in answer.partition(b"\r\n\r\n")[2]
    check_headers(answer)
    check_serves(served)


@pytest.mark.parametrize("path", ["/", "/app.js", "/metrics", "/api/v1/snapshot", "/api/v1/events", "/nothing"])
def test_head_says_what_get_would(served: Served, path: str) -> None:
    answer = raw(served, get(served, path, method="HEAD"))
    assert statuses(answer) == [404 if path == "/nothing" else 200]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body == b""
    check_headers(answer)
    if path != "/api/v1/events":
        assert b"Content-Length: 0" not in head


def test_requests_in_a_row_are_answered_in_order(served: Served) -> None:
    one = get(served).replace(b"Connection: close\r\n", b"")
    answer = raw(served, one * 20 + get(served, "/nothing"))
    assert statuses(answer) == [200] * 20 + [404]


def test_a_body_is_not_taken_for_a_request(served: Served) -> None:
    inner = get(served, "/api/v1/snapshot")
    for lines in ([f"Content-Length: {len(inner)}"], ["Transfer-Encoding: chunked"]):
        assert statuses(raw(served, get(served, "/healthz", *lines) + inner)) == [400]


@pytest.mark.timeout(60)
def test_a_slow_client_is_hung_up_on_however_often_it_sends_a_byte(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_HEAD_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", served.port), 0.05) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(1000):
            with suppress(TimeoutError):
                client.sendall(b"X: y\r\n")
                if client.recv(1) == b"":
                    break
        else:
            raise AssertionError("it is still listened to")
    check_serves(served)


def test_connections_that_say_nothing_make_room(served: Served) -> None:
    with ExitStack() as idle:
        for _ in range(3 * server._MAX_CONNECTIONS):
            idle.enter_context(socket.create_connection(("127.0.0.1", served.port), SECONDS))
        check_serves(served)
        assert threading.active_count() < server._MAX_CONNECTIONS + 50


def test_clients_that_read_nothing_keep_nobody_out(served: Served) -> None:
    with ExitStack() as deaf:
        for _ in range(40):
            client = deaf.enter_context(socket.create_connection(("127.0.0.1", served.port), SECONDS))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.sendall(get(served, "/api/v1/chunks"))
        check_serves(served)


def test_more_streams_than_there_may_be_are_refused(served: Served) -> None:
    with ExitStack() as streams:
        answers = []
        for _ in range(server._MAX_STREAMS + 3):
            client = streams.enter_context(socket.create_connection(("127.0.0.1", served.port), SECONDS))
            client.sendall(get(served, "/api/v1/events"))
            answers.append(client.recv(13))
        assert b"HTTP/1.1 503 " in answers
        check_serves(served)


def test_clients_that_vanish_do_no_harm(served: Served) -> None:
    for _ in range(50):
        raw(served, get(served, "/api/v1/snapshot"), reads=False)
        raw(served, get(served, "/api/v1/events"), reads=False)
    check_serves(served)


@pytest.mark.parametrize(
    "kind", ["1 GB of nothing", "a pipe", "100000 brackets", "odd numbers", "hostile text", "a list"]
)
@pytest.mark.parametrize("file", ["run.json", "records", "chunks", "timeline"])
def test_bad_files_get_an_answer(file: str, kind: str) -> None:
    run = make_run()
    files = {"run.json": run / "run.json", "records": records_file(run, 0)}
    files |= {"chunks": chunks_file(run, 0), "timeline": timeline_file(run, 0)}
    served = Served(run)
    try:
        spoil(files[file], kind)
        assert kind in KINDS
        for path in ("snapshot", "timeline", "chunks", "steps", "../../metrics"):
            answer = raw(served, get(served, f"/api/v1/{path}".replace("/api/v1/../..", "")))
            assert statuses(answer) in ([200], [503]), answer[:400]
            check_headers(answer)
        check_serves(served)
    finally:
        served.close()


# -- other users of the machine

OTHER = """
import encodings.idna, os, socket, sys
os.setgid(54321); os.setuid(54321)
client = socket.create_connection(("127.0.0.1", int(sys.argv[1])), 20)
head = "GET /healthz HTTP/1.1\\r\\nHost: 127.0.0.1:%s\\r\\nConnection: close\\r\\n\\r\\n"
client.sendall((head % sys.argv[1]).encode())
print(client.recv(12).decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_of_the_machine_is_refused() -> None:
    for is_for_all, status in ((False, "403"), (True, "200")):
        served = Served(make_run(), is_for_all_users=is_for_all)
        try:
            done = subprocess.run(
                [sys.executable, "-S", "-c", OTHER, str(served.port)], capture_output=True, text=True, timeout=30
            )
            assert done.stdout.strip() == f"HTTP/1.1 {status}", done.stderr
        finally:
            served.close()


def test_the_owner_of_a_connection_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        for kind in (socket.AF_INET, socket.AF_INET6):
            with socket.socket(kind) as client:
                host = "127.0.0.1" if kind == socket.AF_INET else "::ffff:127.0.0.1"
                try:
                    client.connect((host, listening.getsockname()[1]))
                except OSError:
                    assert kind == socket.AF_INET6  # a machine without it
                    continue
                with listening.accept()[0] as ours:
                    assert peers.is_of_this_user(ours)
                    assert peers.is_of_this_user(ours, tmp_path)  # a system that tells nothing
                    monkeypatch.setattr(os, "geteuid", lambda: 54321)
                    assert peers.is_of_this_user(ours) == (os.getuid() == 0)
                    monkeypatch.setattr(peers, "ROOT", -1)
                    assert not peers.is_of_this_user(ours)
                    monkeypatch.undo()


def check_headers(answer: bytes) -> None:
    for part in answer.split(b"HTTP/1.1 ")[1:]:
        lines = part.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
        headers = dict(line.split(": ", 1) for line in lines)
        assert {name: headers.get(name) for name in HEADERS} == HEADERS


def check_serves(served: Served) -> None:
    assert served.request("/healthz")[2] == b"ok\n"

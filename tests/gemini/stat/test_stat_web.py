"""The page, its API and the report."""

import http.client
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranked_runs import close, numbers, open_ranks
from served_run import Served
from stat_runs import MOMENTS, PREDICTION, chunks, make_run, open_run, stats

from gemini.stat import web_files
from gemini.stat.cli import main
from gemini.telemetry.layout import chunks_file

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served(make_run())
    yield found
    found.close()


def test_the_page_and_its_parts_are_served(served: Served) -> None:
    for path, kind in (("/", "text/html"), ("/app.js", "text/javascript"), ("/style.css", "text/css")):
        status, headers, body = served.request(path)
        assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        assert body
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert served.request("/healthz")[2] == b"ok\n"
    assert b"gemini_memory_steps_total" in served.request("/metrics")[2]


def test_the_api_says_what_the_command_line_says(served: Served) -> None:
    snapshot = served.json("/api/v1/snapshot")
    assert snapshot["snapshot"]["prediction"]["device_predicted_bytes"] is None  # the page then has no line
    assert snapshot["snapshot"]["step"] == 12
    assert snapshot["row"]["advice"][0]["arguments"].startswith("host_memory=")
    assert len(served.json("/api/v1/timeline")["moments"]) == MOMENTS + 1
    assert len(served.json("/api/v1/chunks")["chunks"]) == 64
    assert served.json("/api/v1/steps")["step"] == list(range(1, 13))
    assert len(served.json("/api/v1/steps?max_points=2")["step"]) <= 5


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/..%2f..%2fetc/passwd", "/server.py", "/vendor/../server.py", "/api/v1/nothing", "//x"],
)
def test_nothing_else_is_served(served: Served, path: str) -> None:
    assert served.request(path)[0] == 404


@pytest.mark.parametrize("rank", ["x", "-1", "1e9", "999999999999", "../0"])
def test_a_strange_rank_is_refused(served: Served, rank: str) -> None:
    assert served.request(f"/api/v1/snapshot?rank={rank}")[0] == 400


def test_only_get_and_only_our_own_name(served: Served) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert served.request("/", method)[0] == 405
    assert served.request("/", Host="evil.example")[0] == 421
    assert served.request("/", Host=f"evil.example:{served.port}")[0] == 421
    assert served.request("/", Host=f"localhost:{served.port}")[0] == 200


def test_a_token_is_asked_for_and_becomes_a_cookie() -> None:
    served = Served(make_run(), token="secret")
    try:
        assert served.request("/")[0] == 401
        assert served.request("/?token=wrong")[0] == 401
        assert served.request("/", Authorization="Bearer secret")[0] == 200
        status, headers, _ = served.request("/?token=secret")
        assert (status, headers["Location"]) == (303, "/")
        assert "SameSite=Strict" in headers["Set-Cookie"]
        assert "HttpOnly" in headers["Set-Cookie"]
        cookie = headers["Set-Cookie"].split(";")[0]
        assert served.request("/", Cookie=cookie)[0] == 200
        assert served.request("/", Cookie="gemini_memory_token=wrong")[0] == 401
        assert served.address.endswith("?token=secret")
    finally:
        served.close()


def test_events_tell_new_steps_and_a_crash() -> None:
    writer = open_run()
    assert writer.run_dir is not None
    served = Served(writer.run_dir)
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    try:
        connection.request("GET", "/api/v1/events")
        answer = connection.getresponse()
        assert answer.getheader("Content-Type", "").startswith("text/event-stream")

        def until(condition: Any) -> Any:
            for _ in range(200):
                line = answer.fp.readline()
                if line.startswith(b"data: ") and condition(content := json.loads(line[6:])):
                    return content
            raise AssertionError("it never came")

        until(lambda content: content["snapshot"]["step"] == 12)
        writer.record_step(stats(13))
        until(lambda content: content["snapshot"]["step"] == 13)
        writer.close("crashed")
        assert until(lambda content: content["snapshot"]["status"] == "crashed")["ranks"] == [0]
    finally:
        connection.close()
        served.close()


def test_a_report_is_one_file_that_loads_nothing(tmp_path: Path, capsys: Capture) -> None:
    run = make_run()
    content = chunks()
    content["parameters"][0]["name"] = "</script><script>alert(1)</script><!--"
    chunks_file(run, 0).write_text(json.dumps(content))
    target = tmp_path / "report.html"
    assert main(["report", str(run), "-o", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == target.stat().st_size
    page = target.read_text()
    ours = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:)""", re.sub(r"<style>.*?</style>", "", ours, flags=re.S))
    assert "alert(1)</script>" not in page
    assert page.count("<script") == 2 + web_files.has_charts()
    data = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert data is not None
    assert json.loads(data[1])["snapshot"]["step"] == 12
    assert main(["report", str(run), "-o", "/proc/no/file"]) == 2


CHROMIUM = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(p).exists()), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture
def browser() -> Iterator[Any]:
    """Chromium with everything it asks for and complains about written down."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        instance = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = instance.new_page(viewport={"width": 1280, "height": 1000})
        page.requested = []
        page.complaints = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        yield page
        instance.close()


def test_the_live_page_in_a_browser(browser: Any) -> None:
    writer = open_run()
    assert writer.run_dir is not None
    served = Served(writer.run_dir)
    try:
        browser.goto(served.address)
        browser.wait_for_selector("#status.running", timeout=20000)
        # Not wait_for_function: it evaluates a string when it has to look twice, which the page's policy forbids.
        browser.wait_for_selector("#peak:has-text('forward of ln_f')", state="attached", timeout=20000)
        browser.wait_for_selector("#chunks canvas", timeout=20000)
        assert "host_memory" in browser.inner_text("#advice")
        assert "disk > host" in browser.inner_text("#moves")
        if web_files.has_charts():
            browser.wait_for_selector("#steps canvas", timeout=20000)
        else:
            assert "scripts/build-web" in browser.inner_text("#steps")
        writer.close("crashed")
        begin = time.monotonic()
        browser.wait_for_selector("#status.crashed", timeout=20000)
        assert time.monotonic() - begin < 20
        assert all(url.startswith((served.address, "data:")) for url in browser.requested)
        assert browser.complaints == []
    finally:
        served.close()


def test_the_page_compares_ranks_and_shows_the_one_that_is_chosen(browser: Any) -> None:
    writers = open_ranks(3)
    assert writers[0].run_dir is not None
    served = Served(writers[0].run_dir)
    try:
        browser.goto(served.address)
        browser.wait_for_selector("#ranks tr.slow", timeout=20000)
        assert browser.inner_text("#straggler").startswith("Straggler: rank 2, 0.21 s of its own a step, 1.40 times")
        rows = [row.inner_text().split()[0] for row in browser.query_selector_all("#ranks tbody tr")]
        assert rows == ["min", "median", "max", "0", "1", "2"]
        assert "3 of 3 ranks" in browser.inner_text("#title")
        assert [node.inner_text() for node in browser.query_selector_all(".of-rank")] == [" of rank 0"] * 5
        browser.click("#ranks button >> nth=1")
        browser.wait_for_selector("#ranks-section", state="hidden", timeout=20000)
        assert "rank 1 of 3" in browser.inner_text("#title")
        browser.select_option("#rank", "worst")
        browser.wait_for_selector("#title:has-text('rank 2 of 3')", timeout=20000)
        browser.select_option("#rank", "all")
        browser.wait_for_selector("#ranks tr.slow", timeout=20000)
        writers[1].close("crashed")
        browser.wait_for_selector("#ranks tr.crashed", timeout=20000)
        assert browser.inner_text("#message") == "Crashed: rank 1 crashed; ranks 0, 2 running"
        assert browser.complaints == []
    finally:
        served.close()
        close(writers)


def test_the_api_compares_ranks_and_takes_a_rank() -> None:
    writers = open_ranks(3)
    assert writers[0].run_dir is not None
    served = Served(writers[0].run_dir)
    try:
        snapshot = served.json("/api/v1/snapshot")["snapshot"]
        assert snapshot["all_ranks"]["straggler"]["rank"] == 2
        assert [rank["tiers"]["host"]["used_bytes"] for rank in snapshot["all_ranks"]["ranks"]] == [
            numbers(rank)["host/used_bytes"] for rank in range(3)
        ]
        assert served.json("/api/v1/snapshot?rank=1")["snapshot"]["all_ranks"] is None
        assert served.json("/api/v1/snapshot?rank=worst")["snapshot"]["rank"] == 2
        assert served.json("/api/v1/snapshot?rank=all")["snapshot"]["all_ranks"]["missing"] == []
        assert b'gemini_memory_steps_total{rank="2"' in served.request("/metrics")[2]
    finally:
        served.close()
        close(writers)


def test_a_report_of_several_ranks_compares_them(browser: Any, tmp_path: Path) -> None:
    writers = open_ranks(3)
    close(writers)
    target = tmp_path / "report.html"
    assert main(["report", str(writers[0].run_dir), "-o", str(target)]) == 0
    browser.context.set_offline(True)
    browser.goto(target.as_uri())
    browser.wait_for_selector("#ranks tr.slow", timeout=20000)
    assert "1.40 times the median" in browser.inner_text("#straggler")
    assert browser.query_selector_all("#ranks button") == []
    assert browser.complaints == []


def test_the_report_in_a_browser_without_a_network(browser: Any, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    assert main(["report", str(make_run(**PREDICTION)), "-o", str(target)]) == 0
    browser.context.set_offline(True)
    browser.goto(target.as_uri())
    browser.wait_for_selector("#status.finished", timeout=20000)
    assert "forward of ln_f" in browser.inner_text("#peak")
    assert browser.inner_text("#title").count("step 12") == 1
    said = browser.inner_text("#tiers .predicted")
    assert said == "A step's peak on device: predicted 20.0 GiB, measured 21.0 GiB (+5%)"
    assert [url for url in browser.requested if not url.startswith(("file:", "data:"))] == []
    assert browser.complaints == []

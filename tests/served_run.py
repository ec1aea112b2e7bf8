"""A run on its page, for tests."""

import argparse
import http.client
import json
import threading
from pathlib import Path
from typing import Any

from gemini.stat.server import Server, address_of


class Served:
    """A run that is served on a free port of loopback."""

    def __init__(self, run: Path, token: str | None = None, is_for_all_users: bool = False) -> None:
        options = argparse.Namespace(rank=None, json=True, target=str(run))
        self.server = Server(("127.0.0.1", 0), run, options, token, is_for_all_users)
        self.port = int(self.server.server_address[1])
        self.address = address_of(self.server)
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def request(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def json(self, path: str) -> Any:
        status, _, body = self.request(path)
        assert status == 200, body
        return json.loads(body)

    def close(self) -> None:
        self.server.is_closing.set()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join(20)

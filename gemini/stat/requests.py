"""Which requests the page's server answers: those of its own page, of scripts, and of nobody else. Pure."""

from collections.abc import Set
from email.message import Message
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

METHODS = ("GET", "HEAD")
LONGEST_LINE = 8 << 10
_MOST_FIELDS = 8


class Refusal(NamedTuple):
    """The answer to a request that is refused."""

    status: HTTPStatus
    text: str


class Target(NamedTuple):
    """What is asked for."""

    path: str
    query: dict[str, str]


def fault_of(line: bytes) -> HTTPStatus | None:
    """What is wrong with the first line of a request, as far as its bytes tell; it may be empty."""
    if len(line) > LONGEST_LINE:
        return HTTPStatus.REQUEST_URI_TOO_LONG
    text = line.rstrip(b"\r\n").decode("latin-1")
    return None if text == "" or (text.isascii() and text.isprintable()) else HTTPStatus.BAD_REQUEST


def target_of(text: str) -> Target | None:
    """None for what is no path on this server."""
    if not text.startswith("/") or not text.isascii() or not text.isprintable():
        return None
    try:
        parts = urlsplit(text)
        query = parse_qs(parts.query, max_num_fields=_MOST_FIELDS)
    except ValueError:
        return None
    return None if parts.netloc else Target(parts.path, {key: values[0] for key, values in query.items()})


def refusal(method: str, headers: "Message[str, str]", hosts: Set[str]) -> Refusal | None:
    """Why a request is refused; None if it is not.

    Parameters
    ----------
    hosts
        The names and ports by which the server may be called; empty: any.
    """
    if method not in METHODS:
        return Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "all is read-only: GET and HEAD")
    if headers.defects:
        return Refusal(HTTPStatus.BAD_REQUEST, "a line of the header is none")
    lengths = headers.get_all("Content-Length", [])
    if "Transfer-Encoding" in headers or any(length.strip() != "0" for length in lengths):
        return Refusal(HTTPStatus.BAD_REQUEST, "a request has no body here")
    named = headers.get_all("Host", [])
    if len(named) != 1:
        return Refusal(HTTPStatus.BAD_REQUEST, f"expected one Host, got {len(named)}")
    host = named[0].strip().lower()
    if hosts and host not in hosts:
        return Refusal(HTTPStatus.MISDIRECTED_REQUEST, "this server answers to its own address only")
    if _is_of_another_site(headers, host):
        return Refusal(HTTPStatus.FORBIDDEN, "pages of other sites may not look here")
    return None


def _is_of_another_site(headers: "Message[str, str]", host: str) -> bool:
    """Browsers say from where a request comes. A link from elsewhere may lead here: it does not see the answer."""
    if any(origin.lower() != f"http://{host}" for origin in headers.get_all("Origin", [])):
        return True
    is_link = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
    return headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and not is_link

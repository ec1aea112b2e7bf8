"""Two machines, as far as the network is concerned: two network namespaces, each with two ranks that share a model."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

CHILD = Path(__file__).with_name("child_two_nodes.py")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
SECONDS = 120

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(2 * SECONDS)]


def ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True, timeout=10)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """The names of two network namespaces with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed, which makes network namespaces")
    names = [f"gemini-{os.getpid()}-{number}" for number in range(2)]
    ends = [f"gm{os.getpid() % 100000}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(("ip", "netns", "del", name), check=False, capture_output=True, timeout=10)
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
    yield names
    for name in names:
        subprocess.run(("ip", "netns", "del", name), check=False, capture_output=True, timeout=10)


def test_two_machines_of_two_ranks_have_the_bits_of_one_process(nodes: list[str], tmp_path: Path) -> None:
    started = []
    for number, (name, address) in enumerate(zip(nodes, ADDRESSES, strict=True)):
        for local in range(2):
            variables = {
                "RANK": str(2 * number + local),
                "WORLD_SIZE": "4",
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": "29517",
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": interface(name, address),
            }
            command = ("ip", "netns", "exec", name, sys.executable, str(CHILD), str(tmp_path / "four.pt"))
            started.append(subprocess.Popen(command, env={**os.environ, **variables}))
    try:
        assert [process.wait(SECONDS) for process in started] == [0, 0, 0, 0]
    finally:
        for process in started:
            process.kill()
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = (sys.executable, str(CHILD), str(tmp_path / "one.pt"))
    subprocess.run(command, env={**alone, "OMP_NUM_THREADS": "1"}, check=True, timeout=SECONDS)
    four, one = torch.load(tmp_path / "four.pt"), torch.load(tmp_path / "one.pt")
    assert four.keys() == one.keys() and all(torch.equal(four[name], one[name]) for name in one)


def interface(name: str, address: str) -> str:
    """The network interface of a namespace that has this address."""
    found = subprocess.run(
        ("ip", "-n", name, "-o", "-4", "addr"), check=True, capture_output=True, text=True, timeout=10
    )
    return next(line.split()[1] for line in found.stdout.splitlines() if address in line)

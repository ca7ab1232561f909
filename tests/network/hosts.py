"""Two hosts on one machine: network namespaces with a cable between them, which can be pulled."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin")
INTERFACE = "cable"
# A host has a name of its own: $0.
_NAMED = 'echo "$0" >/proc/sys/kernel/hostname && exec "$@"'
_CARDS = ("02:00:00:00:00:01", "02:00:00:00:00:02")


def _can_make_namespaces() -> bool:
    probe = f"solopo-probe-{os.getpid()}"
    if IP is None or subprocess.run([IP, "netns", "add", probe], capture_output=True).returncode:
        return False
    subprocess.run([IP, "netns", "delete", probe], check=True)
    return True


NEEDS_NAMESPACES = pytest.mark.skipif(
    not _can_make_namespaces(), reason="network namespaces need iproute2, root and a kernel that allows them"
)


@dataclass(frozen=True)
class Host:
    """One end of the cable."""

    namespace: str
    address: str

    def start(self, command: list[str], output: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Run a command as if on this host."""
        settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
        with output.open("wb") as stream:
            return subprocess.Popen(
                [
                    str(IP),
                    "netns",
                    "exec",
                    self.namespace,
                    "unshare",
                    "--uts",
                    "sh",
                    "-c",
                    _NAMED,
                    self.namespace,
                    *command,
                ],
                env=os.environ | settings | environment,
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )


@dataclass(frozen=True)
class Network:
    """Two hosts that see each other, and nothing else."""

    hosts: tuple[Host, Host]

    def cut(self) -> None:
        """From here on packets vanish in both directions, and nobody is told: each host sends to a card that is not."""
        self._send_to("02:00:00:00:00:99", "02:00:00:00:00:99")

    def repair(self) -> None:
        """Let them meet again."""
        self._send_to(_CARDS[1], _CARDS[0])

    def _send_to(self, *cards: str) -> None:
        for here, there, card in zip(self.hosts, reversed(self.hosts), cards, strict=True):
            neighbour = ("neighbour", "replace", there.address, "lladdr", card, "dev", INTERFACE, "nud", "permanent")
            _ip("-n", here.namespace, *neighbour)


@contextmanager
def two_hosts() -> Iterator[Network]:
    """They are gone, and so is what runs on them, after the block."""
    names = [f"solopo-{os.getpid()}-{side}" for side in "ab"]
    hosts = Host(names[0], "10.77.0.1"), Host(names[1], "10.77.0.2")
    for host in hosts:
        _ip("netns", "add", host.namespace)
    try:
        ends = [
            ("name", INTERFACE, "netns", host.namespace, "address", card)
            for host, card in zip(hosts, _CARDS, strict=True)
        ]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        network = Network(hosts)
        network.repair()
        yield network
    finally:
        for host in hosts:
            for number in _output("netns", "pids", host.namespace).split():
                with suppress(ProcessLookupError):
                    os.kill(int(number), signal.SIGKILL)
            _ip("netns", "delete", host.namespace)


def _ip(*arguments: str) -> None:
    _output(*arguments)


def _output(*arguments: str) -> str:
    done = subprocess.run([str(IP), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout

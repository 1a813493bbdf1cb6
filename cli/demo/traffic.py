"""Bytes on the wire from the kernel's own counters (TCP_INFO over NETLINK_SOCK_DIAG), and who holds which socket.

p2pd gives no count per protocol, so totals come from the kernel, files from the peers' own counters, and records are
the rest. Linux only: elsewhere `Wire.sample` sees nothing and the figures are null.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLMSG_DONE, NLMSG_ERROR = 3, 2
REQUEST_DUMP = 0x301
INET_DIAG_INFO = 2
ALL_STATES = 0xFFF
BYTES_ACKED_AT = 120
"""Offset of tcpi_bytes_acked in struct tcp_info (linux/tcp.h): bytes the other end has acknowledged."""


@dataclass(frozen=True)
class TcpSocket:
    """One TCP socket: ports, inode, bytes sent and acknowledged."""

    inode: int
    local_port: int
    remote_port: int
    acked: int


def tcp_sockets() -> list[TcpSocket]:
    """Every TCP socket of this network namespace."""
    found: list[TcpSocket] = []
    if sys.platform != "linux":
        return found
    for family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as link:
            request = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), ALL_STATES)
            request += bytes(48)
            link.send(struct.pack("=IHHII", 16 + len(request), SOCK_DIAG_BY_FAMILY, REQUEST_DUMP, 1, 0) + request)
            found += _read_dump(link)
    return found


def _read_dump(link: socket.socket) -> list[TcpSocket]:
    found: list[TcpSocket] = []
    while True:
        data = link.recv(1 << 18)
        while len(data) >= 16:
            length, kind = struct.unpack_from("=IH", data)
            if kind in (NLMSG_DONE, NLMSG_ERROR) or length < 16:
                return found
            message, data = data[16:length], data[(length + 3) & ~3 :]
            local, remote = struct.unpack_from(">HH", message, 4)
            inode = struct.unpack_from("=I", message, 68)[0]
            attributes = message[72:]
            while len(attributes) >= 4:
                size, name = struct.unpack_from("=HH", attributes)
                if size < 4:
                    break
                if name == INET_DIAG_INFO and size >= 4 + BYTES_ACKED_AT + 8:
                    acked = struct.unpack_from("=Q", attributes, 4 + BYTES_ACKED_AT)[0]
                    found.append(TcpSocket(inode, local, remote, acked))
                attributes = attributes[(size + 3) & ~3 :]


def socket_inodes(pid: int) -> set[int]:
    """Inodes of the sockets a process has open; empty when it is gone."""
    inodes: set[int] = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(entry.path)
            if target.startswith("socket:["):
                inodes.add(int(target[8:-1]))
    except OSError:
        pass
    return inodes


def internet_sockets(pid: int) -> int:
    """How many TCP or UDP sockets a process has open (its pipes and unix sockets are not counted)."""
    internet: set[int] = set()
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text("ascii").splitlines()[1:]
        except OSError:
            continue
        internet |= {int(line.split()[9]) for line in lines}
    return len(socket_inodes(pid) & internet)


def children(pid: int) -> list[tuple[int, str]]:
    """(process id, command line) of the children of a process."""
    found: list[tuple[int, str]] = []
    if sys.platform != "linux":
        return found
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text("utf-8", "replace").rsplit(")", 1)[1].split()[1])
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
            except (OSError, IndexError, ValueError):
                continue
            if parent == pid:
                found.append((int(entry.name), line))
    return found


@dataclass
class Wire:
    """Bytes sent between the demo's p2pd processes, gathered by sampling: a closed socket keeps its last count."""

    sockets: dict[int, tuple[str, int, int, int]] = field(default_factory=dict)
    trainer_sockets: int = 0
    looks: int = 0
    trainers_seen: set[int] = field(default_factory=set)

    def sample(self, peers: dict[str, int]) -> None:
        """Look once. peers: name -> process id of the `paris-swarm` process whose child p2pd is."""
        owner: dict[int, str] = {}
        for name, pid in peers.items():
            for child, line in children(pid):
                if "p2pd" in line.split(" ", 1)[0]:
                    owner |= dict.fromkeys(socket_inodes(child), name)
                elif "train_child" in line:
                    self.trainers_seen.add(child)
                    self.looks += 1
                    self.trainer_sockets += internet_sockets(child)
        for tcp in tcp_sockets():
            if tcp.inode in owner:
                self.sockets[tcp.inode] = (owner[tcp.inode], tcp.local_port, tcp.remote_port, tcp.acked)

    def pairs(self) -> dict[str, int]:
        """ "sender -> receiver" -> bytes; the receiver of an unknown port is "other"."""
        by_ports = {(local, remote): name for name, local, remote, _ in self.sockets.values()}
        totals: dict[str, int] = {}
        for name, local, remote, sent in self.sockets.values():
            key = f"{name} -> {by_ports.get((remote, local), 'other')}"
            totals[key] = totals.get(key, 0) + sent
        return dict(sorted(totals.items()))

    def total(self) -> int:
        return sum(sent for _, _, _, sent in self.sockets.values())

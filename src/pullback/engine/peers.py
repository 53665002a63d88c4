"""Who is at the other ends of a process's unix sockets, without a connection of our own.

A server that takes one client would see a second one, and may end when that leaves (swtpm --terminate);
and what SO_PEERCRED tells is who listened, which for a daemon was a process that is gone. The kernel
tells both ends of each connection (sock_diag(7), linux/unix_diag.h):

    nlmsghdr  length u32, type u16, flags u16, sequence u32, port u32
    request   family u8, protocol u8, padding u16, states u32, inode u32, show u32, cookie 2 x u32
    answer    family u8, type u8, state u8, padding u8, inode u32, cookie 2 x u32; then attributes
    attribute length u16, type u16, value; each begins at a multiple of 4

The numbers are those of inodes, as /proc/PID/fd names them: `socket:[5353242]`.
"""

from __future__ import annotations

import os
import re
import socket as sockets
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_SHOW_PEER, _ATTRIBUTE_PEER = 4, 2
_HEADER = struct.Struct("=IHHII")
_QUESTION = struct.Struct("=BBHIIIII")
_ANSWER = struct.Struct("=BBBBI8x")
_ATTRIBUTE = struct.Struct("=HH")
_EVERY_STATE, _NO_COOKIE = 0xFFFF_FFFF, 0xFFFF_FFFF
_BUFFER = 1 << 17
_SECONDS = 5.0
_SOCKET = re.compile(r"socket:\[(\d+)\]")


def of(pid: int) -> tuple[int, ...]:
    """Ids of the processes that are connected with the process `pid` by unix sockets, itself aside.

    Processes whose descriptors we may not see are missing. Raises `OSError` if those of `pid` cannot be
    seen, or the kernel does not tell.
    """
    ours = set(_sockets(pid))
    theirs = {peer for inode, peer in connections().items() if inode in ours}
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == pid:
            continue
        with suppress(OSError):
            if theirs & set(_sockets(int(name))):
                found.append(int(name))
    return tuple(found)


def _sockets(pid: int) -> Iterator[int]:
    """The inodes of a process's sockets."""
    place = Path("/proc") / str(pid) / "fd"
    for name in os.listdir(place):
        with suppress(FileNotFoundError):
            if match := _SOCKET.fullmatch(os.readlink(place / name)):
                yield int(match[1])


def connections() -> dict[int, int]:
    """The other end's inode of each connected unix socket of our network namespace."""
    with sockets.socket(sockets.AF_NETLINK, sockets.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_SECONDS)
        question = _QUESTION.pack(sockets.AF_UNIX, 0, 0, _EVERY_STATE, 0, _SHOW_PEER, _NO_COOKIE, _NO_COOKIE)
        length = _HEADER.size + len(question)
        kernel.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _REQUEST | _DUMP, 1, 0) + question)
        found: dict[int, int] = {}
        while _take(kernel.recv(_BUFFER), found):
            pass
    return found


def _take(data: bytes, found: dict[int, int]) -> bool:
    """One datagram of messages; False after the last."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, offset)
        if kind == _DONE or length < _HEADER.size:
            return False
        body = data[offset + _HEADER.size : offset + length]
        if kind == _ERROR:
            number = -struct.unpack_from("=i", body)[0]
            raise OSError(number, os.strerror(number))
        if len(body) >= _ANSWER.size and (peer := _peer(body[_ANSWER.size :])) is not None:
            found[_ANSWER.unpack_from(body)[4]] = peer
        offset += -(-length // 4) * 4
    return True


def _peer(attributes: bytes) -> int | None:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, offset)
        if kind == _ATTRIBUTE_PEER and length == _ATTRIBUTE.size + 4:
            return int(struct.unpack_from("=I", attributes, offset + _ATTRIBUTE.size)[0])
        if length < _ATTRIBUTE.size:
            return None
        offset += -(-length // 4) * 4
    return None

"""The sockets that workers share: the ports, the table of their connections, and leaving a shared port."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import struct
import time
from pathlib import Path

SO_ATTACH_FILTER = 26  # Linux
ACCEPT_S = 0.3  # in which gRPC accepts what waits
_NOT_ACCEPTING = -1

# A classic BPF program: of each packet, drop those that open a connection (SYN without ACK), and keep all others.
_DROP_SYN = (
    (0x30, 0, 0, 13),  # load the byte of the TCP flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK of it
    (0x15, 0, 1, 0x02),  # if it is SYN alone, go on, otherwise skip one
    (0x06, 0, 0, 0),  # drop the packet
    (0x06, 0, 0, 0xFFFFFFFF),  # keep the packet
)


def hold_port(host: str, port: int) -> socket.socket:
    """Take a port on which other processes of this user may listen from now on, with SO_REUSEPORT.

    The port is bound before that is allowed, so a port that another program uses is an error here, even if that
    program would share it. Raises OSError if it is, or if the address is not one of this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    holder = socket.socket(family, kind, protocol)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(address)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        holder.close()
        raise
    return holder


def leave_port(port: int) -> None:
    """Let the kernel give new connections to a shared port to other processes, and keep those that are open.

    A listening socket that closes resets the connections that are established but not accepted yet. So the packets that
    open connections are dropped first, until those before them are accepted. A client whose packet was dropped repeats
    it after a second, and another process gets it.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _DROP_SYN))
    filter_ = struct.pack("HL", len(_DROP_SYN), ctypes.addressof(program))
    listeners = [found for found in _sockets_of(port) if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)]
    for listener in listeners:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter_)
    time.sleep(ACCEPT_S)
    for listener in listeners:
        listener.shutdown(socket.SHUT_RD)  # Linux stops to listen
        listener.close()


def count_connections(port: int) -> int:
    """Return the number of this process' connections to a port of its own."""
    count = 0
    for found in _sockets_of(port):
        with found, contextlib.suppress(OSError):  # not connected
            count += bool(found.getpeername())
    return count


def _sockets_of(port: int) -> list[socket.socket]:
    """Return copies of this process' sockets on a port: gRPC does not tell the descriptors of its own."""
    found = []
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):  # closed, or not a socket
            copy = socket.socket(fileno=os.dup(int(entry.name)))
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.getsockname()[1] == port:
                found.append(copy)
            else:
                copy.close()
    return found


class ConnectionTable:
    """The number of HTTP connections of each worker, in memory that they share; one int32 each.

    Args:
        size: the number of entries.
        descriptor: of the table, in a worker; None: make it.
    """

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        self._size = size
        self.descriptor = os.memfd_create("connections") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, 4 * size)
        self._memory = memoryview(mmap.mmap(self.descriptor, 4 * size)).cast("i")
        if descriptor is None:
            for index in range(size):
                self.clear(index)

    def clear(self, index: int) -> None:
        """Mark the worker with this index as not accepting."""
        self._memory[index] = _NOT_ACCEPTING

    def entry(self, index: int) -> TableEntry:
        """Return the entry of the worker with this index."""
        return TableEntry(self._memory, index)


class TableEntry:
    """The entry of one worker; a `Balance` of the HTTP server."""

    def __init__(self, memory: memoryview[int], index: int) -> None:
        self._memory = memory
        self._index = index

    def should_accept(self, connections: int) -> bool:
        """Return False if a worker that accepts has fewer connections."""
        self._memory[self._index] = connections
        return connections <= min(count for count in self._memory if count != _NOT_ACCEPTING)

    def stop(self) -> None:
        """Tell the others that this worker accepts no more."""
        self._memory[self._index] = _NOT_ACCEPTING

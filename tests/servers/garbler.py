"""A TCP proxy that changes one byte of a stream on its way, as a broken line or memory does."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Self


class Garbler:
    """Passes connections on to a server; the n-th byte sent that way is changed, once.

    Args:
        upstream: Host and port of the server.
        at_byte: Which byte, counted over all connections from 0.
        stream: "upstream" (to the server) or "downstream" (its answers).
    """

    def __init__(self, upstream: str, at_byte: int, stream: str = "upstream") -> None:
        self._upstream = upstream
        self._stream = stream
        self._left = at_byte
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def garbled(self) -> bool:
        """Tell whether the byte has come by."""
        return self._left < 0

    def __enter__(self) -> Self:
        """Begin."""
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            host, _, port = self._upstream.rpartition(":")
            far = socket.create_connection((host, int(port)))
            for source, target, stream in ((near, far, "upstream"), (far, near, "downstream")):
                threading.Thread(target=self._pass_on, args=(source, target, stream), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, stream: str) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(self._changed(data) if stream == self._stream else data)
            target.shutdown(socket.SHUT_WR)
        except OSError:  # one side is gone: so is the connection
            source.close()
            target.close()

    def _changed(self, data: bytes) -> bytes:
        with self._lock:
            place, self._left = self._left, self._left - len(data)
        if not 0 <= place < len(data):
            return data
        return data[:place] + bytes([data[place] ^ 0x15]) + data[place + 1 :]

"""A socket whose calls all end by one moment. The timeout of a plain one starts anew with every byte that drips in."""

from __future__ import annotations

import time
from typing import Any


class Deadline:
    """The moment by which an exchange has to be over. Each single wait within it lasts ``step_s`` at most."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.at = float("inf")

    def start(self, budget_s: float) -> None:
        self.at = time.monotonic() + budget_s

    def left(self) -> float:
        """Seconds that the next wait may last. Raises TimeoutError where there are none."""
        left = min(self.at - time.monotonic(), self.step_s)
        if left <= 0:
            raise TimeoutError("the exchange took too long")
        return left


class DeadlineSocket:
    """A connected socket, plain or TLS, bound to a ``Deadline``. Whatever is not named here goes to the socket."""

    def __init__(self, sock: Any, deadline: Deadline) -> None:
        self._sock, self._deadline = sock, deadline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def recv(self, size: int) -> bytes:
        self._sock.settimeout(self._deadline.left())
        received: bytes = self._sock.recv(size)
        return received

    def recv_into(self, buffer: bytearray) -> int:
        self._sock.settimeout(self._deadline.left())
        received: int = self._sock.recv_into(buffer)
        return received

    def sendall(self, data: bytes | memoryview) -> None:
        self._sock.settimeout(self._deadline.left())
        self._sock.sendall(data)

"""Servers for the tests: a real Redis, a proxy that breaks connections at a chosen byte, and impostors."""

from __future__ import annotations

import random
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis


def free_port() -> int:
    """One that the system gives to no client: a server that restarts shall find its own free."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class RedisServer:
    """A server on loopback that keeps nothing on disk."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory, self.options = directory, options
        for _ in range(3):  # another process may take the port first
            self.port = free_port()
            if self.started():
                return
        pytest.fail("redis-server does not start")

    def started(self) -> bool:
        """Whether it serves now."""
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            pytest.fail("these tests need redis-server: apt-get install redis-server")
        flags = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self.directory)]
        self.process = subprocess.Popen(
            [program, "--port", str(self.port), *flags, *self.options], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        if any("ready to accept connections" in line.lower() for line in self.process.stdout):
            return True
        self.kill()
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def restart(self) -> None:
        self.kill()
        assert self.started()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @contextmanager
    def client(self, db: int = 0) -> Iterator[redis.Redis]:
        """A second client, to see and to spoil what the pool keeps."""
        client = redis.Redis(port=self.port, db=db)
        try:
            yield client
        finally:
            client.close()


@dataclass(frozen=True)
class Fault:
    """What happens to one connection. Bytes count what came from the server, or from the client with ``upward``."""

    after: int = 0
    """Bytes that pass before ``end``."""
    end: str = "close"
    """close, reset, stall or drip."""
    upward: bool = False
    at: Callable[[], None] | None = None
    """Called when the bytes have passed, before ``end``."""
    rewrite: tuple[bytes, bytes] | None = None
    """Instead of an end: the first bytes become the second ones, wherever they come by."""


class Proxy:
    """Stands between client and server. The i-th connection suffers ``faults[i]``; later ones pass."""

    def __init__(self, port: int, faults: list[Fault | None]) -> None:
        self.target, self.faults = port, faults
        self.over = threading.Event()
        self.open: list[socket.socket] = []
        self.reset: set[socket.socket] = set()
        self.threads: list[threading.Thread] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.accepted = 0
        self.spawn(self.accept)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def spawn(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return  # closed
            fault = self.faults[self.accepted] if self.accepted < len(self.faults) else None
            self.accepted += 1
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()
                continue
            self.open += [client, server]
            self.spawn(self.pump, client, server, fault if fault and fault.upward else None)
            self.spawn(self.pump, server, client, fault if fault and not fault.upward else None)

    def pump(self, source: socket.socket, sink: socket.socket, fault: Fault | None) -> None:
        passed, held = 0, b""
        try:
            while data := source.recv(1 << 16):
                if fault is None:
                    sink.sendall(data)
                elif fault.rewrite is not None:
                    old, new = fault.rewrite
                    held = (held + data).replace(old, new)
                    tail = next((n for n in range(min(len(old), len(held)), 0, -1) if old.startswith(held[-n:])), 0)
                    sink.sendall(held[: len(held) - tail])
                    held = held[len(held) - tail :]
                elif passed + len(data) <= fault.after:
                    sink.sendall(data)
                    passed += len(data)
                else:
                    sink.sendall(data[: fault.after - passed])
                    self.finish(source, sink, fault, data[fault.after - passed :])
                    return
        except OSError:
            pass  # the other side went first
        for sock in {source, sink} - self.reset:
            self.end(sock)

    def finish(self, source: socket.socket, sink: socket.socket, fault: Fault, rest: bytes) -> None:
        if fault.at is not None:
            fault.at()
        if fault.end == "stall":
            self.over.wait()
        elif fault.end == "drip":
            for i in range(len(rest)):
                sink.sendall(rest[i : i + 1])
                if self.over.wait(0.01):
                    break
        for sock in (source, sink):
            if fault.end == "reset":
                self.reset.add(sock)
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RD)  # else the other thread's recv would keep it open
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
            else:
                self.end(sock)

    @staticmethod
    def end(sock: socket.socket) -> None:
        with suppress(OSError):  # it may have ended already
            sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.over.set()
        self.end(self.listener)
        self.listener.close()
        for sock in self.open:
            self.end(sock)
        for thread in self.threads:
            thread.join()
        for sock in self.open:
            sock.close()


@contextmanager
def proxy(port: int, *faults: Fault | None) -> Iterator[Proxy]:
    between = Proxy(port, list(faults))
    try:
        yield between
    finally:
        between.close()


@contextmanager
def impostor(reply: Callable[[bytes], bytes]) -> Iterator[str]:
    """The URL of what answers each packet by ``reply``, and closes where that is empty."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []
    open_: list[socket.socket] = []

    def serve(client: socket.socket) -> None:
        try:
            while (data := client.recv(1 << 16)) and (answer := reply(data)):
                client.sendall(answer)
        except OSError:
            pass  # the client went first
        Proxy.end(client)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # closed
            open_.append(client)
            threads.append(threading.Thread(target=serve, args=(client,), daemon=True))
            threads[-1].start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
    finally:
        Proxy.end(listener)
        listener.close()
        accepting.join()
        for client in open_:
            Proxy.end(client)
        for thread in threads:
            thread.join()
        for client in open_:
            client.close()

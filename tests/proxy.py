"""A TCP proxy on loopback that counts bytes, and can be slow, cut, healed, and pointed elsewhere."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes of payload since the proxy was made."""

    to_server: int
    to_client: int

    @property
    def total(self) -> int:
        return self.to_server + self.to_client

    def since(self, earlier: Traffic) -> Traffic:
        return Traffic(self.to_server - earlier.to_server, self.to_client - earlier.to_client)


class Proxy:
    """Forwards connections to `127.0.0.1:target_port` from construction until `close`."""

    def __init__(self, target_port: int) -> None:
        self._changed = threading.Condition()
        self._target_port = target_port
        self._delay_s = 0.0
        self._is_cut = False
        self._closed = False
        self._bytes = {"to_server": 0, "to_client": 0}
        self._sockets: set[socket.socket] = set()
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        _end(self._listener)
        self.drop()

    @property
    def traffic(self) -> Traffic:
        with self._changed:
            return Traffic(**self._bytes)

    def delay(self, seconds: float) -> None:
        """Hold every piece of data back for so long, in both directions."""
        with self._changed:
            self._delay_s = seconds

    def cut(self) -> None:
        """As if the cable were cut: connections stay, and nothing passes, until `heal`."""
        with self._changed:
            self._is_cut = True

    def heal(self) -> None:
        """Let data pass again, what was held back included, without delay."""
        with self._changed:
            self._is_cut = False
            self._delay_s = 0.0
            self._changed.notify_all()

    def drop(self) -> None:
        """End all connections."""
        with self._changed:
            ended, self._sockets = self._sockets, set()
        for each in ended:
            _end(each)

    def point_at(self, target_port: int) -> None:
        """Forward new connections to another server from now on; old ones stay (but see `drop`)."""
        with self._changed:
            self._target_port = target_port

    def _start(self, target: object, *arguments: object) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()  # type: ignore[arg-type]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                self.connections += 1
                target_port = self._target_port
            try:
                server = socket.create_connection(("127.0.0.1", target_port), timeout=5)
            except OSError:
                _end(client)
                continue
            server.settimeout(None)
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._changed:
                self._sockets |= {client, server}
            self._start(self._pump, client, server, "to_server")
            self._start(self._pump, server, client, "to_client")

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        try:
            while piece := source.recv(1 << 16):
                with self._changed:
                    self._changed.wait_for(lambda: not self._is_cut or self._closed)
                    delay_s = self._delay_s
                time.sleep(delay_s)
                with self._changed:
                    self._bytes[direction] += len(piece)
                sink.sendall(piece)
        except OSError:
            pass
        finally:
            with self._changed:
                self._sockets -= {source, sink}
            _end(source)
            _end(sink)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()

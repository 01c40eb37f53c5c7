"""How many connections a server keeps open, so that clients which ask for nothing cannot take all of its files."""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

log = logging.getLogger(__name__)
OTHER_FILES = 64
"""Files that the process has open beside its connections."""
_REFUSED = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def most_connections(texts: int) -> int:
    """For a server of so many texts at once, waiting ones included: the answer beyond them is 429, and not yet 503."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(8, min(2 * texts + 32, files - OTHER_FILES))


def limited(most: int) -> type[asyncio.Protocol]:
    """uvicorn's protocol with at most so many connections.

    A new one beyond that takes the place of the one that has asked for nothing for the longest time. Where all of them
    wait for answers, it is refused (503).
    """
    base: Any = AutoHTTPProtocol

    class Connection(base):
        def connection_made(self, transport: asyncio.Transport) -> None:
            self.heard = self.loop.time()
            open_ones = [one for one in self.connections if not one.transport.is_closing()]
            super().connection_made(transport)
            if len(open_ones) < most:
                return
            idle = [one for one in open_ones if one.cycle is None or one.cycle.response_complete]
            if idle:
                min(idle, key=lambda one: one.heard).transport.close()
            else:
                log.warning("all of %d connections wait for answers: another one was refused", most)
                transport.write(_REFUSED)
                transport.close()

        def data_received(self, data: bytes) -> None:
            self.heard = self.loop.time()
            super().data_received(data)

    return Connection

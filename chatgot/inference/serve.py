"""A page and OpenAI's completions for the model of a run folder: `chatgot serve`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import secrets
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

from chatgot.errors import ConfigError, MachineError
from chatgot.inference.batching import Batch
from chatgot.inference.sample import RunArguments

log = logging.getLogger(__name__)
TOKEN = "CHATGOT_TOKEN"
"""Variable that holds the token; a command line is seen by everybody on the machine."""
OTHER_FILES = 64
"""Files that the process has open beside its connections."""
_REFUSED = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True)
class ServeArguments(RunArguments):
    """The command line of `chatgot serve`."""

    host: str = "127.0.0.1"
    port: int = 0
    allow_host: tuple[str, ...] = ()
    streams: int = 16
    queue: int = 64
    max_tokens: int = 4096
    max_seconds: float = 300.0
    max_body: int = 1 << 20


def serve(arguments: ServeArguments) -> None:
    """Load the model and answer until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: starlette or uvicorn is missing, or a value out of range.
        CheckpointError, DataError: see `RunArguments.open`.
        MachineError: the address cannot be listened on.
    """
    if arguments.max_seconds <= 0:
        raise ConfigError(f"--max_seconds {arguments.max_seconds}: must be above 0")
    try:
        import uvicorn

        from chatgot.inference.completions import CopyFinder, Served
        from chatgot.inference.server import application
    except ImportError as error:
        raise ConfigError(f"chatgot serve: {error}; pip install -e .[serve]") from error
    listening = _listen(arguments.host, arguments.port)
    address = listening.getsockname()[0]
    token = os.environ.get(TOKEN) or (None if _is_loopback(address) else secrets.token_urlsafe(24))
    (loaded, source), marking = arguments.open(), arguments.mark_copied
    finder = None if source is None or marking is None else CopyFinder(source, marking)
    batch = Batch(loaded.gpt, arguments.streams, arguments.queue)
    name = arguments.run.resolve().name
    config = loaded.gpt.config
    about = {"id": name, "object": "model", "created": int(arguments.run.stat().st_mtime), "owned_by": "chatgot"}
    about |= {"max_model_len": config.max_seq_length, "vocab_size": loaded.gpt.vocab_size}
    about |= {"max_tokens": arguments.max_tokens, "mark_copied": marking}
    served = Served(batch, loaded.tokenizer, about, arguments.max_seconds, arguments.max_body, finder)
    names = {"localhost", arguments.host, *arguments.allow_host}
    if not _is_loopback(address):
        names |= {socket.gethostname(), socket.getfqdn()}
    app = application(served, names, token)
    quiet = {"log_level": "warning", "access_log": False, "server_header": False, "lifespan": "off", "ws": "none"}
    most = most_connections(arguments.streams + arguments.queue)
    kept = {"http": limited(most), "backlog": most, "timeout_keep_alive": 30, "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(app, **kept, **quiet))
    shown = socket.gethostname() if address in ("0.0.0.0", "::") else address
    shown = f"[{shown}]" if ":" in shown else shown
    print(f"{name}: http://{shown}:{listening.getsockname()[1]}/{f'#token={token}' if token else ''}", flush=True)
    print(
        "Ctrl-C ends it." + (f" Clients give the token as their api_key; {TOKEN} sets it." if token else ""), flush=True
    )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # which uvicorn raises again at its end
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
        batch.close()
    if not server.started:
        sys.exit(MachineError.exit_code)  # uvicorn has said why


def _listen(host: str, port: int) -> socket.socket:
    """A socket at this address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # who comes before the model is read waits
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise MachineError(f"--host {host} --port {port}: cannot be listened on: {why}; give another") from error
    return listening


def _is_loopback(address: str) -> bool:
    import ipaddress

    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def most_connections(texts: int) -> int:
    """For a server of so many texts at once, waiting ones included: the answer beyond them is 429, and not yet 503."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(8, min(2 * texts + 32, files - OTHER_FILES))


def limited(most: int) -> type[asyncio.Protocol]:
    """uvicorn's protocol with at most so many connections.

    A new one beyond that takes the place of the one that has asked for nothing for the longest time. Where all of them
    wait for answers, it is refused (503).
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

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

"""A page and OpenAI's completions for the model of a run folder: `chatgot serve`."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from chatgot.errors import ConfigError, MachineError

TOKEN = "CHATGOT_TOKEN"
"""Variable that holds the token; a command line is seen by everybody on the machine."""


@dataclass(frozen=True)
class ServeArguments:
    """The command line of `chatgot serve`."""

    run: Path
    host: str = "127.0.0.1"
    port: int = 0
    allow_host: tuple[str, ...] = ()
    streams: int = 16
    queue: int = 64
    max_tokens: int = 4096
    max_seconds: float = 300.0
    max_body: int = 1 << 20
    tag: str | None = None
    device: str = "auto"
    mark_copied: int | None = None
    """Look for passages of at least so many characters that stand in the training text; None: don't."""
    data: str | None = None
    """The training text, as for --data of train.py; None: where the run had it."""


def serve(arguments: ServeArguments) -> None:
    """Load the model and answer until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: starlette or uvicorn is missing, or a value out of range.
        CheckpointError: see `load_run`.
        DataError: copies are to be marked, and the training text is not at hand.
        MachineError: the address cannot be listened on.
    """
    if not 0 <= arguments.port < 65536:
        raise ConfigError(f"--port {arguments.port}: must be 0 (any free one) to 65535")
    if arguments.max_seconds <= 0:
        raise ConfigError(f"--max_seconds {arguments.max_seconds}: must be above 0")
    try:
        import uvicorn

        from chatgot.inference.connections import limited, most_connections
        from chatgot.inference.copy_finder import CopyFinder
        from chatgot.inference.server import Limits, Served, application
    except ImportError as error:
        raise ConfigError(f"chatgot serve: {error}; pip install -e .[serve]") from error
    from chatgot.inference.batching import Batch
    from chatgot.inference.copied import training_text
    from chatgot.inference.sample import load_run

    listening = _listen(arguments.host, arguments.port)
    address = listening.getsockname()[0]
    token = os.environ.get(TOKEN) or (None if _is_loopback(address) else secrets.token_urlsafe(24))
    loaded = load_run(arguments.run, arguments.tag, arguments.device)
    finder, marking = None, arguments.mark_copied
    if marking is not None:
        finder = CopyFinder(training_text(arguments.run, loaded.checkpoint, arguments.data), marking)
    batch = Batch(loaded.gpt, arguments.streams, arguments.queue)
    name = arguments.run.resolve().name
    config = loaded.gpt.config
    about = {"id": name, "object": "model", "created": int(arguments.run.stat().st_mtime), "owned_by": "chatgot"}
    size = {"max_model_len": config.max_seq_length, "vocab_size": loaded.gpt.vocab_size}
    limits = Limits(arguments.max_tokens, arguments.max_seconds, arguments.max_body)
    served = Served(
        batch, loaded.tokenizer, limits, {**about, **size, "max_tokens": limits.tokens, "mark_copied": marking}, finder
    )
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

"""The web application of `chatgot serve`: the page, OpenAI's completions, and who may use them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatgot.inference.batching import QueueFullError
from chatgot.inference.completions import Completion, CopyFinder, Served
from chatgot.inference.requests import CopiedRequest, RefusedError, read_body, read_prompts, read_request

log = logging.getLogger(__name__)
PAGE = Path(__file__).with_name("page.html")
BODY_SECONDS = 20.0
"""A request that has not come by then is given up."""


def application(served: Served, hosts: Collection[str], token: str | None) -> ASGIApp:
    """Make the application.

    Args:
        hosts: names that the Host header may have; addresses of this machine's loopback may always stand there.
        token: demanded of whoever asks for /v1; None: of nobody.
    """
    page = PAGE.read_text(encoding="utf-8")
    guarded = {"Content-Security-Policy": _content_policy(page)}

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page, headers=guarded)

    async def health(request: Request) -> Response:
        active, waiting = served.batch.counts
        state = "ok" if served.batch.alive else "the thread that computes has ended; start it again"
        body = {"status": state, "active": active, "waiting": waiting, "streams": served.batch.streams}
        return JSONResponse(body, 200 if served.batch.alive else 503)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [served.model]})

    async def model(request: Request) -> Response:
        _check_name(request.path_params["name"], served)
        return JSONResponse(served.model)

    def finder_of_copies(param: str | None = None) -> CopyFinder:
        if served.finder is None:
            raise RefusedError(400, "copies are not looked for: start chatgot serve with --mark_copied", param)
        return served.finder

    async def copied(request: Request) -> Response:
        finder = finder_of_copies()
        asked = read_body(CopiedRequest, await _body(request, served.max_body))
        return JSONResponse(await finder.find(asked.text))

    async def completions(request: Request) -> Response:
        asked = read_request(await _body(request, served.max_body), served.model["max_tokens"])
        _check_name(asked.model, served)
        prompts = await run_in_threadpool(read_prompts, asked, served.tokenizer)
        most = served.batch.streams + served.batch.most_waiting
        if (texts := len(prompts) * (asked.n or 1)) > most:
            raise RefusedError(400, f"{texts} texts in one request (prompts x n): at most {most} here", "n")
        if asked.mark_copied:
            finder_of_copies("mark_copied")
        work = Completion(asked, prompts, served)
        try:
            served.batch.submit(work.generations)
        except QueueFullError:
            raise RefusedError(429, "too many texts are waiting already; try again in a while") from None
        if asked.stream:
            leaving = BackgroundTask(served.batch.cancel, work.generations)  # whose stream may not have begun
            return StreamingResponse(work.stream(), media_type="text/event-stream", background=leaving)
        return JSONResponse(await _unless_left(request, work.whole()))

    routes = [
        Route("/", show_page),
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/copied", copied, methods=["POST"]),
    ]
    handlers = {HTTPException: _refuse, ClientDisconnect: _leave}
    app = Starlette(routes=routes, exception_handlers=handlers)
    return Gate(app, hosts, token)


class Gate:
    """Lets in who may use the server, and nobody else's page.

    * A Host header must name this server: a page of another site may have its own name point here (DNS rebinding).
    * A request with another site's Origin, or that a browser says comes from one, is refused, and none is ever told
      that it may read an answer (no CORS header).
    * /v1 wants the token, where there is one. The page itself holds nothing that is secret.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], token: str | None) -> None:
        self._app, self._token = app, token
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", []).extend(_HEADERS)
            await send(message)

        refusal = self._refusal(Headers(scope=scope), scope["path"])
        answer = self._app if refusal is None else JSONResponse(refusal.body, refusal.status_code)
        await answer(scope, receive, guarded_send)

    def _refusal(self, headers: Headers, path: str) -> RefusedError | None:
        host = headers.get("host", "")
        if not self._known(host):
            allowed = ", ".join(sorted(self._hosts))
            return RefusedError(403, f"Host {host!r} is not this server's; allowed: {allowed} (--allow_host adds one)")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return RefusedError(403, f"requests of other sites' pages are refused (Origin {origin!r})")
        api = path.startswith("/v1")
        if api and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return RefusedError(403, "requests of other sites' pages are refused (Sec-Fetch-Site)")
        if api and self._token is not None:
            given = headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode("utf-8", "replace"), self._token.encode()):
                return RefusedError(
                    401, "give the server's token: Authorization: Bearer TOKEN (an api_key, for clients)"
                )
        return None

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self._hosts:
                return True
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # With a token any address may stand there: no name of another site points to it, and there are many.
        return address.is_loopback or self._token is not None


_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


def _content_policy(page: str) -> str:
    """Allow the page its own script and style, by their hashes, and requests to this server; nothing else."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"{nothing}; connect-src 'self'; img-src data:; script-src {hashes('script')}; style-src {hashes('style')}"


async def _unless_left(request: Request, work: Any) -> dict[str, Any]:
    """Await the work; raises ClientDisconnect and ends it when the client goes away."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _body(request: Request, most: int) -> bytes:
    """Read the body. JSON only, since any page may send a form elsewhere without being asked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(415, f"Content-Type {kind!r}: send application/json")
    body = bytearray()

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > most:
                raise RefusedError(413, f"the body has more than {most} bytes")

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise RefusedError(408, f"the body has not come within {BODY_SECONDS:.0f} seconds") from None
    return bytes(body)


def _check_name(name: str | None, served: Served) -> None:
    if name not in (None, served.model["id"]):
        raise RefusedError(404, f"model {name!r}: there is only {served.model['id']!r}", "model")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, RefusedError):
        what = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(RefusedError(error.status_code, what).body, error.status_code, headers=error.headers)
    return JSONResponse(error.body, error.status_code, headers=error.headers)


async def _leave(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it

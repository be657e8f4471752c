"""The HTTP server: image in, JSON out. Starlette answers requests, a thread forms batches."""

from __future__ import annotations

import asyncio
import hmac
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from anyio import to_thread
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from torch import Tensor

from vispeft.data.images import read_image
from vispeft.errors import ConfigError, DataError, UnknownNameError, VispeftError
from vispeft.serving.batches import Batches, BusyError
from vispeft.serving.figures import Figures
from vispeft.serving.outputs import Meaning
from vispeft.serving.room import Place, Room
from vispeft.serving.server import Server

__all__ = ["Limits", "make_app"]

logger = logging.getLogger(__name__)

GONE = 499
"""Status in the figures for a client that closed its connection (nginx's number)."""
DRAINED = 16
"""A body beyond the limit is read, and dropped, up to this many times the limit, so that its sender sees the answer."""
NAMES = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
"""Letters of an adapter's name."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes."""

    bytes: int = 16 * 2**20
    """Bytes of a request."""
    held: int = 256 * 2**20
    """Bytes of all requests that are on their way: of files that arrive or wait to be decoded, and of the prepared
    images that wait for their answer."""
    pixels: int = 50_000_000
    """Pixels of an image, before it is decoded."""
    seconds: float = 10.0
    """Seconds in which a request has to arrive."""
    answer_seconds: float = 30.0
    """Seconds in which it is answered."""
    decoding: int = 2
    """Images that are decoded at the same time."""

    def __post_init__(self) -> None:
        """Validate the limits.

        Raises:
            ConfigError: If one is not above zero.
        """
        wrong = [name for name, value in vars(self).items() if not value > 0]
        if wrong:
            raise ConfigError(f"Limits({wrong[0]}={getattr(self, wrong[0])}): a number above 0 is needed.")


class _RefusedError(Exception):
    """A request that gets no answer, with its status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


Check = Callable[[str, str], None]


class _Pages:
    """The pages of the server."""

    def __init__(
        self, server: Server, batches: Batches, limits: Limits, token: str | None, top: int, check: Check | None
    ) -> None:
        self.server, self.batches, self.limits, self.token, self.top = server, batches, limits, token, top
        self.check = check
        self.figures = Figures()
        batches.on_batch = self.figures.batch
        self.decoders, self.room = asyncio.Semaphore(limits.decoding), Room(limits.held)
        self.meanings = {name: self._read(name) for name in server.names}
        self.change = asyncio.Lock()

    def _read(self, name: str) -> Meaning:
        """Read how the images of an adapter are prepared and answered; refuse one whose images would never fit."""
        meaning = Meaning(name, self.server.notes(name), self.top)
        needed = self.limits.bytes + meaning.bytes
        if needed > self.limits.held:
            raise ConfigError(
                f"Adapter {name!r}: a request of {self.limits.bytes} bytes and the {meaning.bytes} of the image that "
                f"is made of it are more than the {self.limits.held} that all requests may hold. Set --held_mb higher, "
                "or --max_mb lower."
            )
        return meaning

    # ------------------------------------------------------------------ answers

    async def answer(self, request: Request) -> Response:
        """Answer an image: POST /answer/ADAPTER with the bytes of an image file."""
        start, name = time.monotonic(), request.path_params["name"]
        try:
            with self.room.place() as place:
                found = await self._found(request, name, place)
            status, response = 200, JSONResponse({"adapter": name, **found})
        except _RefusedError as refused:
            status, response = refused.status, _error(refused.status, refused.reason)
        except ClientDisconnect:
            status, response = GONE, Response(status_code=400)  # nobody reads it
        except Exception:
            logger.exception("A request to %s failed.", name)
            status, response = 500, _error(500, "The image could not be answered; the server's log says why.")
        self.figures.request(name if name in self.meanings else "", status, time.monotonic() - start)
        return response

    async def _found(self, request: Request, name: str, place: Place) -> dict[str, Any]:
        meaning = self._meaning(name)
        content = await self._body(request, place)
        if request.headers.get("content-type", "").startswith("multipart/"):
            reason = "The request is a form. Send the bytes of the file alone, as curl --data-binary @FILE does."
            raise _RefusedError(415, reason)
        image = await self._image(meaning, content, place)
        del content  # the file is not needed while its image waits
        found = meaning.read(await self._asked(image, name, meaning))
        if found is None:
            raise _RefusedError(500, f"The outputs of adapter {name!r} for this image are not finite.")
        return found

    def _meaning(self, name: str) -> Meaning:
        if name not in self.meanings:
            raise _RefusedError(404, str(UnknownNameError("adapter", name, self.meanings)))
        return self.meanings[name]

    async def _body(self, request: Request, place: Place) -> io.BytesIO:
        """Read the body of a request within its limits. What is refused is read and dropped, as far as `DRAINED`."""
        most, told = self.limits.bytes, request.headers.get("content-length", "")
        length = int(told) if told.isdecimal() else 0
        large = _RefusedError(413, f"The request is larger than {most} bytes, the most this server takes.")
        full = _RefusedError(503, f"Requests hold the {self.limits.held} bytes they may already. Try again later.")
        refused = large if length > most else None if place.fits(length) else full
        if refused and (length > DRAINED * most or request.headers.get("expect", "").lower() == "100-continue"):
            raise refused
        content, size = io.BytesIO(), 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for piece in request.stream():
                    size += len(piece)
                    if size > most:
                        refused = large
                    elif refused is None and not place.holds(size):
                        refused = full
                    if refused is None:
                        content.write(piece)
                    elif place.own:
                        content = io.BytesIO()
                        place.holds(0)
                    if size > DRAINED * most:
                        raise large
        except TimeoutError:
            late = _RefusedError(408, f"The request did not arrive within {self.limits.seconds:g} seconds.")
            raise refused or late from None
        if refused:
            raise refused
        if not size:
            raise _RefusedError(400, "The request has no body. Send the bytes of an image file.")
        return content

    async def _image(self, meaning: Meaning, content: io.BytesIO, place: Place) -> Tensor:
        """Decode and prepare an image, once a thread is free."""
        if not place.holds(place.own + meaning.bytes):
            raise _RefusedError(503, f"Requests hold the {self.limits.held} bytes they may already. Try again later.")
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                await self.decoders.acquire()
        except TimeoutError:
            reason = f"The image was not decoded within {self.limits.answer_seconds:g} seconds. Try again later."
            raise _RefusedError(503, reason) from None
        try:
            image = await to_thread.run_sync(self._decoded, meaning, content)
        finally:
            self.decoders.release()
        place.holds(meaning.bytes)
        return image

    def _decoded(self, meaning: Meaning, content: io.BytesIO) -> Tensor:
        """Decode and prepare an image, in a thread."""
        reading = meaning.reading_up_to(self.limits.pixels)
        try:
            image: Tensor = meaning.prepare(read_image(content, "The body", reading, meaning.least))
        except DataError as error:
            raise _RefusedError(400, str(error)) from None
        return image

    async def _asked(self, image: Tensor, name: str, meaning: Meaning) -> Tensor:
        """Wait for the scores of an image."""
        try:
            waiting: Future[Tensor] = self.batches.ask(image, name)
        except UnknownNameError as error:
            raise _RefusedError(404, str(error)) from None
        except BusyError as error:
            raise _RefusedError(503, str(error)) from None
        if self.meanings.get(name) is not meaning:
            waiting.cancel()
            reason = f"Adapter {name!r} was exchanged while the image was on its way. Send it again."
            raise _RefusedError(503, reason)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(waiting), self.limits.answer_seconds)
        except TimeoutError:
            reason = f"The image was not answered within {self.limits.answer_seconds:g} seconds. Try again later."
            raise _RefusedError(503, reason) from None

    # ------------------------------------------------------------------ adapters

    async def adapters(self, request: Request) -> Response:
        """List the adapters: GET /adapters."""
        found = [{"name": name, "target": own.target, "classes": own.names} for name, own in self.meanings.items()]
        return JSONResponse({"adapters": found})

    async def add(self, request: Request) -> Response:
        """Add an adapter: PUT /adapters/NAME with {"source": DIRECTORY}."""
        try:
            name = self._allowed(request)
            try:
                with self.room.place() as place:
                    source = json.loads((await self._body(request, place)).getvalue())["source"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise _RefusedError(400, 'The body is no JSON such as {"source": "runs/birds/1"}.') from None
            if not isinstance(source, str) or not name or not set(name) <= NAMES:
                raise _RefusedError(400, "The source is a text, and a name has letters, digits, '-' and '_'.")
            async with self.change:
                await to_thread.run_sync(self._add, name, source)
        except _RefusedError as refused:
            return _error(refused.status, refused.reason)
        except ClientDisconnect:
            return Response(status_code=400)
        except VispeftError as error:
            return _error(409 if name in self.meanings else 400, str(error))
        except Exception:
            logger.exception("Adapter %s could not be added.", name)
            return _error(400, "The adapter could not be added; the server's log says why.")
        return JSONResponse({"adapter": name}, 201)

    def _add(self, name: str, source: str) -> None:
        if self.check is not None:
            self.check(name, source)
        self.server.add(source, name)
        try:
            self.meanings[name] = self._read(name)
        except BaseException:
            self.server.remove(name)
            raise

    async def remove(self, request: Request) -> Response:
        """Remove an adapter: DELETE /adapters/NAME. Images that wait for it are answered first."""
        try:
            name = self._allowed(request)
            async with self.change:
                self._meaning(name)
                del self.meanings[name]
                await to_thread.run_sync(self.server.remove, name)
        except _RefusedError as refused:
            return _error(refused.status, refused.reason)
        return JSONResponse({"removed": name})

    def _allowed(self, request: Request) -> str:
        """Refuse a change of the adapters without the token; return the adapter's name."""
        if self.token is None:
            raise _RefusedError(
                403, "Adapters of this server are fixed. Start it with VISPEFT_SERVE_TOKEN set to change it."
            )
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise _RefusedError(401, "Adapters are changed with the header Authorization: Bearer TOKEN.")
        return str(request.path_params["name"])

    # ------------------------------------------------------------------ state

    async def health(self, request: Request) -> Response:
        """Tell whether images are answered: GET /health."""
        alive = self.batches.alive
        values = {"status": "ok" if alive else "stopping", "adapters": len(self.meanings)}
        return JSONResponse({**values, "waiting": self.batches.waiting}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """Give figures in Prometheus' text format: GET /metrics."""
        text = self.figures.text(self.batches.waiting, len(self.meanings), self.room.held)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _error(status: int, reason: str) -> Response:
    # The body of a refused request may not have been read, and the next one would begin in its middle.
    headers = {"connection": "close"} | ({"retry-after": "1"} if status == 503 else {})
    return JSONResponse({"error": reason}, status, headers)


def make_app(
    server: Server,
    batches: Batches,
    limits: Limits | None = None,
    *,
    token: str | None = None,
    top: int = 5,
    check: Check | None = None,
) -> Starlette:
    """Make the ASGI application of a server.

    Args:
        server: Answers images.
        batches: Collects them; stopped with the application.
        limits: What it takes.
        token: Word that lets a client add and remove adapters; None for a server whose adapters are fixed.
        top: Number of likeliest classes in an answer.
        check: Called with name and source of an adapter before a client adds it; it may raise.

    Raises:
        ConfigError: If an adapter gives no scores for an image, or its images do not fit into `Limits.held`.
    """
    pages = _Pages(server, batches, limits or Limits(), token, top, check)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await to_thread.run_sync(batches.stop)

    def route(path: str, page: Callable[[Request], Any], method: str) -> Route:
        return Route(path, page, methods=[method])

    return Starlette(
        routes=[
            route("/answer/{name}", pages.answer, "POST"),
            route("/adapters", pages.adapters, "GET"),
            route("/adapters/{name}", pages.add, "PUT"),
            route("/adapters/{name}", pages.remove, "DELETE"),
            route("/health", pages.health, "GET"),
            route("/metrics", pages.metrics, "GET"),
        ],
        lifespan=lifespan,
    )

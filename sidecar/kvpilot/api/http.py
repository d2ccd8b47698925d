"""HTTP, read-only: it shows and cannot operate.

    /metrics          Prometheus (OpenMetrics where asked for)      /status    JSON
    /metrics/picker   what an endpoint picker reads                 /healthz   is the loop turning
    /                 the console, and what it asks for under /console

Served by the pilot's own event loop, so that a rendering sees whole ticks only.
"""

import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from kvpilot.api.console.routes import add_console
from kvpilot.api.console.show import Show
from kvpilot.api.console.stream import cut_off
from kvpilot.clock import NS, Clock
from kvpilot.flight import Flight
from kvpilot.publish.exposition import CONTENT_TYPES
from kvpilot.publish.prometheus import MetricsPage
from kvpilot.publish.status import StatusPage
from kvpilot.version import version

UNHEALTHY_AFTER_S = 5.0


class HttpError(Exception):
    """The address cannot be listened on; one line."""


def build_app(
    flight: Flight, clock: Clock, page: MetricsPage | None = None, show: Show | None = None
) -> FastAPI:
    """The application. `page` is the metrics page where the caller has added to it; `show` the console's,
    where somebody runs it."""
    page, kept = page or MetricsPage(flight), StatusPage(flight)
    app = FastAPI(title="kvpilot", version=version(), openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        body, content_type = await page.answer(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    @app.get("/metrics/picker")
    async def picker() -> Response:
        return Response(page.picker(), headers={"Content-Type": CONTENT_TYPES["text"]})

    @app.get("/status")
    async def show_status() -> Response:
        return Response(kept.body(), media_type="application/json")

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        tick = flight.pilot.board.tick
        silent_s = (clock.monotonic_ns() - tick.at_ns) / NS if tick else None
        healthy = silent_s is None or silent_s < UNHEALTHY_AFTER_S
        body = {"status": "ok" if healthy else "stuck", "seconds_since_tick": silent_s}
        return JSONResponse(body, status_code=200 if healthy else 503)

    add_console(app, flight, show or Show(flight, clock))
    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises HttpError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = error.strerror or str(error)
        raise HttpError(
            f"http {host}:{port}: {reason}: write another address as `api: {{port: N}}`"
        ) from error
    bound.listen(64)
    return bound


class HttpServer(uvicorn.Server):
    """Uvicorn inside the pilot's loop. Signals are the pilot's: leases are withdrawn before sockets close."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def build_server(app: FastAPI) -> HttpServer:
    """A server for `app`; run it with `serve(sockets=[...])`, stop it by setting `should_exit`."""
    logging.getLogger("uvicorn.error").addFilter(cut_off)
    return HttpServer(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            http="h11",
            ws="none",
            timeout_graceful_shutdown=1,
        )
    )

"""The console's addresses. All of them are GET: the console shows, it cannot operate.

/                             the page            /console/{file}                  its files
/console/stream               frames, 2 Hz        /console/decisions/{number}      why
/console/tests                the policies' own   /console/incidents[/{start}]     recordings
"""

import asyncio
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from kvpilot.api.console.archive import Archive, ArchiveError
from kvpilot.api.console.assets import PAGE, SECURITY, Asset, load_assets
from kvpilot.api.console.show import Show
from kvpilot.api.console.stream import EventStream
from kvpilot.explain.export import as_json
from kvpilot.explain.inquiry import inquire
from kvpilot.flight import Flight
from kvpilot.journal.store import JournalError

MOST_DIGITS = 18
_JSON = {"Content-Type": "application/json", "Cache-Control": "no-store"}


def add_console(app: FastAPI, flight: Flight, show: Show) -> None:
    """Add the page, its files and what it asks for."""
    assets = load_assets()
    archive = Archive(flight)

    @app.get("/")
    async def page(request: Request) -> Response:
        return _answer(assets[PAGE], request)

    @app.get("/console/stream")
    async def stream() -> Response:
        viewer = show.viewers.join()
        if viewer is None:
            return _problem(HTTPStatus.SERVICE_UNAVAILABLE, "as many watch as may: close another console")
        return EventStream(show.viewers, viewer, show.first())

    @app.get("/console/decisions/{number}")
    async def decision(number: str) -> Response:
        if not (number.isascii() and number.isdecimal() and len(number) <= MOST_DIGITS):
            return _problem(HTTPStatus.NOT_FOUND, f"{number[:40]!r}: a decision is a number, such as 412")
        try:
            found = await asyncio.to_thread(inquire, flight.journal.path, int(number), 1)
        except JournalError as error:
            return _problem(HTTPStatus.NOT_FOUND, str(error))
        return JSONResponse(as_json(found, pilot=True)["decisions"][0], headers={"Cache-Control": "no-store"})

    @app.get("/console/tests")
    async def tests() -> Response:
        return await _archived(archive, "tests")

    @app.get("/console/incidents")
    async def incidents() -> Response:
        return await _archived(archive, "incidents")

    @app.get("/console/incidents/{start}")
    async def incident(start: str) -> Response:
        return await _archived(archive, "incident", start)

    @app.get("/console/{name:path}")
    async def file(name: str, request: Request) -> Response:
        asset = assets.get(name)
        if asset is None:
            return _problem(HTTPStatus.NOT_FOUND, "no such file of the console")
        return _answer(asset, request)


def _answer(asset: Asset, request: Request) -> Response:
    headers = {**SECURITY, "ETag": asset.etag}
    if request.headers.get("if-none-match") == asset.etag:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(asset.body, headers={**headers, "Content-Type": asset.media_type})


async def _archived(archive: Archive, what: str, start: str | None = None) -> Response:
    try:
        return Response(await archive.ask(what, start), headers=_JSON)
    except ArchiveError as error:
        return _problem(error.status, str(error))


def _problem(status: HTTPStatus, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status, headers={"Cache-Control": "no-store"})

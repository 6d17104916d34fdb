"""The application: routes, the guard before them, and errors in the shape that each protocol expects."""

from __future__ import annotations

import mimetypes
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import ASGIApp

from kvcompose_local import __version__
from kvcompose_local.server import anthropic, completions, openai, own, responses
from kvcompose_local.server.guard import Access, Guard, refusal
from kvcompose_local.server.requests import Refused
from kvcompose_local.server.service import Service

_PATHS = "/v1/models, /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages and a page at /"
PAGE = Path(__file__).parent / "page"


def application(service: Service, access: Access) -> ASGIApp:
    """The ASGI application that serves these models to whom it may."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            service.worker.stop()
            service.worker.join(5)

    app = FastAPI(
        title="kvcompose-local",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server runs; it never waits for a model."""
        return {"status": "ok"}

    @app.get("/props")
    async def props() -> dict[str, object]:
        """What is served, and what it takes."""
        return service.props()

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _file("index.html")

    @app.get("/page/{name:path}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return _file(name)

    for protocol in (openai, completions, responses, anthropic, own):
        app.include_router(protocol.router)

    @app.exception_handler(Refused)
    async def refused(http: HttpRequest, error: Refused) -> Response:
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
        return JSONResponse(refusal(http.url.path, error), error.status, headers)

    @app.exception_handler(HTTPException)
    async def failed(http: HttpRequest, error: HTTPException) -> Response:
        text = {404: f"there is nothing here: this server has {_PATHS}", 405: "not by this method"}.get(
            error.status_code, str(error.detail)
        )
        return JSONResponse(refusal(http.url.path, Refused(error.status_code, text)), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HttpRequest, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(x) for x in first["loc"] if x != "body")
        what = f"{place or 'body'}: {first['msg']}"
        if first["type"] == "json_invalid":
            at = f" at character {first['loc'][-1]}" if first["loc"][-1] else ""
            what, place = f"the body is no JSON: {first['ctx']['error']}{at}", ""
        elif not place:
            what = "the body is to be a JSON object, sent with Content-Type: application/json"
        told = Refused(400, what, param=place or None)
        return JSONResponse(refusal(http.url.path, told), 400)

    @app.exception_handler(Exception)
    async def broken(http: HttpRequest, error: Exception) -> Response:
        told = Refused(500, f"the server failed at this request: {type(error).__name__}")
        return JSONResponse(refusal(http.url.path, told), 500)

    return Guard(app, access)


def _file(name: str) -> Response:
    """A file of the page. Raises HTTPException."""
    try:
        path = (PAGE / name).resolve()
        is_there = path.is_relative_to(PAGE.resolve()) and path.is_file() and path.suffix != ".py"
    except (OSError, ValueError):  # too long, or with a NUL in it
        is_there = False
    if not is_there:
        raise HTTPException(404)
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})

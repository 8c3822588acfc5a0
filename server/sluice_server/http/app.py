"""The HTTP applications: the REST protocol's health and metadata paths, and the metrics endpoint.

REST inference is not there yet: its paths answer 501 and name gRPC, so that nobody takes them for a wrong address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sluice_server.errors import NotFound, SluiceError
from sluice_server.observability.metrics import CONTENT_TYPE
from sluice_server.status import HTTP_CODES

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from sluice_server.protocol.rpcs import ServerIdentity
    from sluice_server.repository.manager import ModelManager
    from sluice_server.status import StatusMapper

NOT_READY = 400
"""What Triton answers for live, ready and model ready when the answer is no."""

_MODELS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version:int}")
_MEMORY = ("/v2/systemsharedmemory", "/v2/cudasharedmemory")

NOT_THERE_YET: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_MODELS, ("GET",)),
    **{f"{path}/config": ("GET",) for path in _MODELS},
    **{f"{path}/stats": ("GET",) for path in _MODELS},
    **{f"{path}/infer": ("POST",) for path in _MODELS},
    "/v2/models/stats": ("GET",),
    "/v2/repository/index": ("POST",),
    "/v2/repository/models/{model}/load": ("POST",),
    "/v2/repository/models/{model}/unload": ("POST",),
    **{f"{path}/status": ("GET",) for path in _MEMORY},
    **{f"{path}/unregister": ("POST",) for path in _MEMORY},
    **{f"{path}/region/{{region}}/status": ("GET",) for path in _MEMORY},
    **{f"{path}/region/{{region}}/register": ("POST",) for path in _MEMORY},
    **{f"{path}/region/{{region}}/unregister": ("POST",) for path in _MEMORY},
    "/v2/trace/setting": ("GET", "POST"),
    "/v2/models/{model}/trace/setting": ("GET", "POST"),
    "/v2/logging": ("GET", "POST"),
}
"""The REST protocol's other paths (compatibility, section 17), with their methods: known, and answered with 501."""


def metrics_app(render: Callable[[], bytes]) -> Starlette:
    """GET /metrics, in the Prometheus text format."""

    def metrics(_request: Request) -> Response:
        return Response(render(), headers={"content-type": CONTENT_TYPE})

    return Starlette(routes=[Route("/metrics", metrics)])


def rest_app(
    manager: ModelManager, identity: ServerIdentity, extensions: tuple[str, ...], to_status: StatusMapper
) -> Starlette:
    """Health, readiness and server metadata (compatibility, section 17)."""

    async def live(_request: Request) -> Response:
        return Response()

    async def ready(_request: Request) -> Response:
        return Response(status_code=200 if manager.server_ready else NOT_READY)

    async def model_ready(request: Request) -> Response:
        try:
            manager.find(request.path_params["model"], str(request.path_params.get("version", "")))
        except NotFound:
            return Response(status_code=NOT_READY)
        return Response()

    async def metadata(_request: Request) -> Response:
        return JSONResponse({"name": identity.name, "version": identity.version, "extensions": list(extensions)})

    async def not_there(request: Request) -> Response:
        text = f"{request.url.path} is not implemented over REST in this version: use the gRPC port"
        return JSONResponse({"error": text}, status_code=501)

    async def refused(_request: Request, error: Exception) -> Response:
        status = to_status(error)
        return JSONResponse({"error": status.message}, status_code=HTTP_CODES[status.code])

    async def no_route(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)

    app = Starlette(
        routes=[
            Route("/v2", metadata),
            Route("/v2/health/live", live),
            Route("/v2/health/ready", ready),
            *(Route(f"{path}/ready", model_ready) for path in _MODELS),
            *(Route(path, not_there, methods=methods) for path, methods in NOT_THERE_YET.items()),
        ],
        exception_handlers={SluiceError: refused, HTTPException: no_route},
    )
    app.router.redirect_slashes = False  # /v2/ is not /v2
    return app

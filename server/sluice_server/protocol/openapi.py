"""The REST protocol's description in OpenAPI 3.1, made of its table of paths; served as /v2/openapi.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice_proto import tensors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sluice_server.protocol.rest_routes import Endpoint, Route

_TEXT = {"type": "string"}
_FLAG = {"type": "boolean"}
_SIZE = {"type": "integer", "minimum": 0}
_DATATYPES = list(tensors.BY_NAME)


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_PARAMETERS = {"type": "object", "additionalProperties": {"type": ["string", "boolean", "integer", "number"]}}
_REGION = _object("name byte_size", name=_TEXT, key=_TEXT, offset=_SIZE, byte_size=_SIZE, device_id=_SIZE)

_SCHEMAS: dict[str, Any] = {
    "Any": {"type": "object"},
    "Error": _object("error", error=_TEXT),
    "InferRequest": _object(
        "inputs",
        id=_TEXT,
        parameters=_PARAMETERS,
        inputs=_list(
            _object(
                "name shape datatype",
                name=_TEXT,
                shape=_list(_SIZE),
                datatype={"type": "string", "enum": _DATATYPES},
                parameters=_PARAMETERS,
                data={"type": "array", "description": "The elements in row-major order, flat or nested as the shape"},
            )
        ),
        outputs=_list(_object("name", name=_TEXT, parameters=_PARAMETERS)),
    ),
    "InferResponse": _object(
        "model_name model_version outputs",
        id=_TEXT,
        model_name=_TEXT,
        model_version=_TEXT,
        parameters=_PARAMETERS,
        outputs=_list(
            _object(
                "name shape datatype",
                name=_TEXT,
                shape=_list(_SIZE),
                datatype=_TEXT,
                parameters=_PARAMETERS,
                data={"type": "array"},
            )
        ),
    ),
    "IndexRequest": _object(ready=_FLAG),
    "Index": _list(_object("name", name=_TEXT, version=_TEXT, state=_TEXT, reason=_TEXT)),
    "ControlRequest": _object(parameters=_PARAMETERS),
    "SystemRegion": _object("key byte_size", key=_TEXT, offset=_SIZE, byte_size=_SIZE),
    "CudaRegion": _object(
        "raw_handle device_id byte_size", raw_handle=_object("b64", b64=_TEXT), device_id=_SIZE, byte_size=_SIZE
    ),
    "Regions": _list(_REGION),
    "TraceSettings": {
        "type": "object",
        "additionalProperties": {"type": ["string", "integer", "array", "null"], "items": _TEXT},
    },
    "LogSettings": {"type": "object", "additionalProperties": {"type": ["string", "integer", "boolean"]}},
}

_HEAD_LENGTH = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "description": "The length of the JSON when binary tensors follow it; 0: the body is the one input's data alone",
    "schema": _SIZE,
}


def describe(version: str, routes: Iterable[Route]) -> dict[str, Any]:
    """The document as it is served."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sluice",
            "version": version,
            "description": "The KServe v2 inference protocol with Triton's extensions. Query strings are ignored.",
        },
        "paths": {
            route.path: {
                "parameters": [
                    {"name": part[1:-1], "in": "path", "required": True, "schema": _path_schema(part)}
                    for part in route.segments
                    if part.startswith("{")
                ],
                **{verb.lower(): _operation(verb, route, endpoint) for verb, endpoint in route.endpoints.items()},
            }
            for route in routes
        },
        "components": {"schemas": _SCHEMAS},
    }


def _path_schema(part: str) -> dict[str, Any]:
    return {"type": "string", "pattern": "^[0-9]+$"} if part == "{version}" else {"type": "string", "minLength": 1}


def _operation(verb: str, route: Route, endpoint: Endpoint) -> dict[str, Any]:
    done: dict[str, Any] = {"description": "Done"}
    if endpoint.gives is not None:
        done["content"] = {"application/json": {"schema": _reference(endpoint.gives)}}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{verb.lower()}{route.path.translate(_NO_SIGNS)}",
        "responses": {"200": done, "default": _error()},
    }
    if endpoint.takes is not None:
        operation["requestBody"] = {
            "required": endpoint.takes == "InferRequest",
            "content": {"application/json": {"schema": _reference(endpoint.takes)}},
        }
    if endpoint.gives == "InferResponse":
        operation["parameters"] = [_HEAD_LENGTH]
        done["content"]["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    if endpoint.gives is None and verb == "GET":
        operation["responses"]["400"] = {"description": "Not ready"}
    return operation


_NO_SIGNS = str.maketrans({"/": "_", "{": "", "}": "", ".": "_"})


def _error() -> dict[str, Any]:
    return {
        "description": "What was wrong",
        "content": {"application/json": {"schema": _reference("Error")}},
    }


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}

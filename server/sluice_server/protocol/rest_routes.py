"""The paths of the REST protocol, which RPC each is, and that RPC's messages as bodies (compatibility, section 17).

Everything but inference is a table of small translations: a body and the names in the path become the RPC's request,
its answer becomes a body. What is not in the RPC table answers as the RPC does.
"""

from __future__ import annotations

import base64
import binascii
import functools
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.errors import InvalidArgument
from sluice_server.protocol import rest_json
from sluice_server.protocol.rest_json import MalformedJson, member, optional, to_json
from sluice_server.status import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

NOT_READY = 400
"""What Triton answers for live, ready and model ready when the answer is no."""

PATHS_MAX = 1024
"""Paths that are kept with what they name: those in use are few."""

PATH_LENGTH_MAX = 256
"""Of those. With PATHS_MAX it bounds what strangers can have kept."""

Names = Mapping[str, str]
"""The names that a path holds: `model`, `version`, `region`; those that it lacks are not in it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One verb of one path: its RPC, and the translations. `answer` gives a status and, unless the body is empty, JSON.

    `rpc` is None for what is no RPC: the description of this protocol. `takes` and `gives` are names of that
    description's schemas.
    """

    rpc: str | None
    summary: str
    request: Callable[[Names, bytes], Message]
    answer: Callable[[Any], tuple[int, Any]]
    response: type[Message] | None = None
    takes: str | None = None
    gives: str | None = None
    codes: Mapping[Code, int] = field(default_factory=dict)
    """HTTP codes that differ from the table's."""


EMPTY = object()
"""A body without anything."""


@dataclass(frozen=True, slots=True)
class Route:
    """One path with its endpoints by verb."""

    path: str
    endpoints: Mapping[str, Endpoint]
    segments: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.path.split("/")[1:]))


class Routes:
    """Finds what a path names."""

    def __init__(self, routes: list[Route]) -> None:
        self.routes = routes
        self._by_length: dict[int, list[Route]] = {}
        for route in routes:
            self._by_length.setdefault(len(route.segments), []).append(route)
        self._find_again = functools.lru_cache(PATHS_MAX)(self._find)

    def find(self, path: str) -> tuple[Route, Names] | None:
        """The route of a path as it was sent, percent-encoded and without a query; None when there is none."""
        return self._find_again(path) if len(path) <= PATH_LENGTH_MAX else self._find(path)

    def _find(self, path: str) -> tuple[Route, Names] | None:
        segments = path.split("/")[1:]
        for route in self._by_length.get(len(segments), ()):
            names = _match(route.segments, segments)
            if names is not None:
                return route, names
        return None


def _match(pattern: tuple[str, ...], segments: list[str]) -> Names | None:
    names = {}
    for wanted, given in zip(pattern, segments, strict=True):
        if wanted == given:
            continue
        if not wanted.startswith("{") or not given:
            return None
        if "%" in given:
            try:
                given = urllib.parse.unquote(given, errors="strict")
            except UnicodeDecodeError:
                return None
        if wanted == "{version}" and not (given.isascii() and given.isdecimal()):
            return None
        names[wanted[1:-1]] = given
    return names


INFER = Endpoint(
    "ModelInfer", "Run a model", lambda _names, _body: pb.ModelInferRequest(), lambda _answer: (200, EMPTY),
    pb.ModelInferResponse, "InferRequest", "InferResponse",
)  # fmt: skip
"""Inference has a translation of its own."""

DESCRIPTION = Endpoint(
    None, "This description", lambda _names, _body: pb.ServerLiveRequest(), lambda _answer: (200, EMPTY), gives="Any"
)

_BY_MODEL = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")


def routes() -> Routes:
    """Every path there is."""
    found = [Route(f"{path}/infer", {"POST": INFER}) for path in _BY_MODEL]
    found += [Route(f"{path}/ready", {"GET": _ready("ModelReady", "Whether a model is ready")}) for path in _BY_MODEL]
    found += [
        Route("/v2/health/live", {"GET": _ready("ServerLive", "Whether the server lives")}),
        Route("/v2/health/ready", {"GET": _ready("ServerReady", "Whether the server is ready")}),
        Route("/v2", {"GET": _get("ServerMetadata", "Name, version and extensions", lambda _names: {}, to_json)}),
        Route("/v2/openapi.json", {"GET": DESCRIPTION}),
        Route("/v2/models/stats", {"GET": _get("ModelStatistics", "Statistics of all models", _model, to_json)}),
    ]
    for path in _BY_MODEL:
        found += [
            Route(path, {"GET": _get("ModelMetadata", "A model's tensors", _model, _metadata)}),
            Route(f"{path}/config", {"GET": _get("ModelConfig", "A model's configuration", _model, _config)}),
            Route(f"{path}/stats", {"GET": _get("ModelStatistics", "A model's statistics", _model, to_json)}),
        ]
    found += _repository() + _memory("system", "SystemSharedMemory") + _memory("cuda", "CudaSharedMemory")
    return Routes(found + _settings())


# --- the translations of each group


def _endpoint(
    rpc: str,
    summary: str,
    request: Callable[[Any, Names, bytes], None],
    answer: Callable[[Any], tuple[int, Any]],
    takes: str | None = None,
    gives: str | None = "Any",
    codes: Mapping[Code, int] | None = None,
) -> Endpoint:
    classes: dict[str, Any] = vars(pb)
    request_class = classes[f"{rpc}Request"]

    def build(names: Names, body: bytes) -> Message:
        message: Message = request_class()
        request(message, names, body)
        return message

    return Endpoint(rpc, summary, build, answer, classes[f"{rpc}Response"], takes, gives, codes or {})


def _get(
    rpc: str, summary: str, fields: Callable[[Names], dict[str, str]], translate: Callable[[Any], Any]
) -> Endpoint:
    def fill(message: Any, names: Names, _body: bytes) -> None:
        for name, value in fields(names).items():
            setattr(message, name, value)

    return _endpoint(rpc, summary, fill, lambda answer: (200, translate(answer)))


def _ready(rpc: str, summary: str) -> Endpoint:
    def fill(message: Any, names: Names, _body: bytes) -> None:
        for name, value in _model(names).items():
            setattr(message, name, value)

    def tell(answer: Any) -> tuple[int, Any]:
        return (200 if (answer.live if rpc == "ServerLive" else answer.ready) else NOT_READY), EMPTY

    return _endpoint(rpc, summary, fill, tell, gives=None)


def _model(names: Names) -> dict[str, str]:
    return {{"model": "name"}.get(key, key): value for key, value in names.items()}


def _metadata(answer: Any) -> dict[str, Any]:
    fields = to_json(answer)
    if not fields["properties"]:
        del fields["properties"]
    return fields


def _config(answer: Any) -> dict[str, Any]:
    return to_json(answer.config)


def _nothing(_answer: Any) -> tuple[int, Any]:
    return 200, EMPTY


def _repository() -> list[Route]:
    def index(message: Any, _names: Names, body: bytes) -> None:
        message.ready = optional(rest_json.load_object(body), "ready", bool)

    def indexed(answer: Any) -> tuple[int, Any]:
        return 200, [{key: value for key, value in to_json(entry).items() if value} for entry in answer.models]

    def control(message: Any, names: Names, body: bytes) -> None:
        message.model_name = names["model"]
        for key, value in optional(rest_json.load_object(body), "parameters", dict).items():
            target = _new_key(message.parameters, key)
            if key.startswith("file:") and isinstance(value, str):
                target.bytes_param = _base64(key, value)
            else:
                rest_json.set_parameter(target, key, value)

    model = "/v2/repository/models/{model}"
    listing = _endpoint("RepositoryIndex", "The models there are", index, indexed, "IndexRequest", "Index")
    load = _endpoint("RepositoryModelLoad", "Load a model", control, _nothing, "ControlRequest", None)
    unload = _endpoint("RepositoryModelUnload", "Unload a model", control, _nothing, "ControlRequest", None)
    return [
        Route("/v2/repository/index", {"POST": listing}),
        Route(f"{model}/load", {"POST": load}),
        Route(f"{model}/unload", {"POST": unload}),
    ]


def _memory(kind: str, rpc: str) -> list[Route]:
    def name(message: Any, names: Names, _body: bytes) -> None:
        message.name = names.get("region", "")

    def register(message: Any, names: Names, body: bytes) -> None:
        message.name = names["region"]
        fields = rest_json.load_object(body)
        message.byte_size = _unsigned(fields, "byte_size")
        if kind == "system":
            rest_json.set_text(message, "key", member(fields, "key", str))
            message.offset = _unsigned(fields, "offset") if "offset" in fields else 0
        else:
            message.device_id = _signed(fields, "device_id")
            message.raw_handle = _base64("raw_handle", member(member(fields, "raw_handle", dict), "b64", str))

    def regions(answer: Any) -> tuple[int, Any]:
        return 200, [to_json(answer.regions[key]) for key in sorted(answer.regions)]

    status = _endpoint(f"{rpc}Status", "The regions that are registered", name, regions, gives="Regions")
    unregister = _endpoint(f"{rpc}Unregister", "Forget regions", name, _nothing, gives=None)
    enter = _endpoint(f"{rpc}Register", "Register a region", register, _nothing, f"{kind.title()}Region", None)
    path = f"/v2/{kind}sharedmemory"
    return [
        Route(f"{path}/status", {"GET": status}),
        Route(f"{path}/unregister", {"POST": unregister}),
        Route(f"{path}/region/{{region}}/status", {"GET": status}),
        Route(f"{path}/region/{{region}}/register", {"POST": enter}),
        Route(f"{path}/region/{{region}}/unregister", {"POST": unregister}),
    ]


def _settings() -> list[Route]:
    def ask_trace(message: Any, names: Names, _body: bytes) -> None:
        message.model_name = names.get("model", "")

    def set_trace(message: Any, names: Names, body: bytes) -> None:
        message.model_name = names.get("model", "")
        for key, value in rest_json.load_object(body).items():
            target = _new_key(message.settings, key)
            target.SetInParent()
            # null, and a list of nothing: back to the default.
            values = [] if value is None else value if isinstance(value, list) else [value]
            target.value.extend(_words(key, values))

    def trace(answer: Any) -> tuple[int, Any]:
        settings = {key: list(answer.settings[key].value) for key in answer.settings}
        return 200, {key: value if key == "trace_level" else ", ".join(value) for key, value in settings.items()}

    def ask_log(_message: Any, _names: Names, _body: bytes) -> None:
        pass

    def set_log(message: Any, _names: Names, body: bytes) -> None:
        fields = rest_json.load_object(body)
        for key in _LOG_KINDS.keys() & fields.keys():
            _set_log(message.settings[key], fields, key)

    def log(answer: Any) -> tuple[int, Any]:
        return 200, {key: next(iter(to_json(answer.settings[key]).values()), None) for key in answer.settings}

    tracing = {
        "GET": _endpoint("TraceSetting", "The trace settings", ask_trace, trace),
        "POST": _endpoint("TraceSetting", "Change trace settings", set_trace, trace, "TraceSettings"),
    }
    logging = {
        "GET": _endpoint("LogSettings", "The log settings", ask_log, log),
        "POST": _endpoint("LogSettings", "Change log settings", set_log, log, "LogSettings", codes=_LOG_CODES),
    }
    return [
        Route("/v2/trace/setting", tracing),
        Route("/v2/models/{model}/trace/setting", tracing),
        Route("/v2/logging", logging),
    ]


def _words(key: str, values: list[Any]) -> list[str]:
    words = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise MalformedJson(f"Unable to parse '{key}': attempt to access JSON non-string as string")
        words.append(str(value))
    if any(not _is_unicode(word) for word in words):
        raise MalformedJson(f"Unable to parse '{key}': it is not Unicode text")
    return words


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_LOG_KINDS: dict[str, tuple[type, str]] = {
    "log_file": (str, "string_param"),
    "log_info": (bool, "bool_param"),
    "log_warning": (bool, "bool_param"),
    "log_error": (bool, "bool_param"),
    "log_verbose_level": (int, "uint32_param"),
    "log_format": (str, "string_param"),
}
"""Log setting -> its type in JSON, and its field. A wrong type is 500, and others are passed over, as in Triton."""

_LOG_CODES = {Code.INVALID_ARGUMENT: 503}
"""What is left to refuse then is the format, which Triton does with this code."""


def _set_log(target: Any, fields: dict[str, Any], key: str) -> None:
    kind, target_field = _LOG_KINDS[key]
    target.SetInParent()
    if fields[key] is None:  # back to the default
        return
    value = member(fields, key, kind)
    if kind is str:
        rest_json.set_text(target, target_field, value)
    elif kind is int and not 0 <= value < 1 << 32:
        raise MalformedJson(f"Unable to parse '{key}': attempt to access JSON non-unsigned-integer as one")
    else:
        setattr(target, target_field, value)


def _new_key(mapping: Any, key: str) -> Any:
    try:
        return mapping[key]
    except ValueError as error:
        raise MalformedJson("failed to parse the request JSON buffer: a key is not Unicode text") from error


def _unsigned(fields: dict[str, Any], name: str) -> int:
    value: int = member(fields, name, int)
    if not 0 <= value < 1 << 64:
        raise MalformedJson(f"Unable to parse '{name}': attempt to access JSON non-unsigned-integer as one")
    return value


def _signed(fields: dict[str, Any], name: str) -> int:
    value: int = member(fields, name, int)
    if not -(1 << 63) <= value < 1 << 63:
        raise MalformedJson(f"Unable to parse '{name}': attempt to access JSON non-integer as integer")
    return value


def _base64(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument(f"'{name}' is not base64: {error}") from error

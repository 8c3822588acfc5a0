"""The RPC TraceSetting: trace settings of the server or of a model, told and changed (compatibility, section 15)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.errors import InvalidArgument, Unimplemented
from sluice_server.observability.trace_control import TraceMode
from sluice_server.observability.trace_sampling import LEVELS, OFF, UNLIMITED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sluice_server.observability.trace_control import TraceControl
    from sluice_server.repository.manager import ModelManager
    from sluice_server.security.control import ControlPolicy
    from sluice_server.transport.call import Call

NUMBER_MAX = 2**32 - 1
"""What Triton takes: rates and frequencies are unsigned 32-bit numbers there."""

_WHOLE = re.compile(r"[+-]?[0-9]{1,10}", re.ASCII)

_NUMBERS = {"trace_rate": ("rate", 0), "trace_count": ("count", UNLIMITED), "log_frequency": ("log_frequency", 0)}
"""Setting -> its field of TraceOptions, and the least value."""


class TraceSettings:
    """Answers TraceSetting. A setting without a value is cleared; unknown ones are passed over, as in Triton."""

    def __init__(self, traces: TraceControl, manager: ModelManager, control: ControlPolicy) -> None:
        self._traces = traces
        self._manager = manager
        self._control = control

    def answer(self, request: Any, call: Call) -> pb.TraceSettingResponse:
        """Change what the request names, all of it or nothing, and tell every setting.

        `InvalidArgument`: a value, or a model that is not served; `Unimplemented`: what is fixed at start;
        `PermissionDenied`: a change by a peer that may not control the server.
        """
        model = request.model_name
        if model and not self._manager.served_versions(model):
            raise InvalidArgument(f"Request for unknown model : {model}")
        if request.settings:
            self._control.check("a change by TraceSetting", call.peer)
            changes = self._changes({key: list(setting.value) for key, setting in request.settings.items()})
            self._traces.sampler.change(changes, model)
        return self._tell(model)

    def _changes(self, settings: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        if "trace_file" in settings:
            raise Unimplemented("trace file location can not be updated through network protocol")
        if list(settings.get("trace_mode") or [self._traces.mode]) != [self._traces.mode]:
            raise Unimplemented("trace mode can not be updated through network protocol: it is that of --trace-config")
        changes: dict[str, Any] = {}
        if "trace_level" in settings:
            changes |= self._levels(settings["trace_level"])
        for key, (field, least) in _NUMBERS.items():
            if key in settings:
                changes[field] = _number(key, settings[key], least) if settings[key] else None
        return changes

    def _levels(self, values: Sequence[str]) -> dict[str, tuple[str, ...] | None]:
        if not values:
            return {"levels": None}
        if OFF in values:
            if len(values) > 1:
                raise InvalidArgument(f"trace_level {OFF} excludes every other, got: {', '.join(values)[:80]}")
            return {"levels": ()}
        known = tuple(level for level in LEVELS if level in values)
        if "TENSORS" in known and self._traces.mode is TraceMode.OPENTELEMETRY:
            raise Unimplemented("trace_level TENSORS is there in the trace mode triton only")
        return {"levels": known} if known else {}

    def _tell(self, model: str) -> pb.TraceSettingResponse:
        options = self._traces.sampler.options(model)
        response = pb.TraceSettingResponse()
        told = {
            "trace_level": options.levels or (OFF,),
            "trace_rate": (str(options.rate),),
            "trace_count": (str(options.count),),
            "log_frequency": (str(options.log_frequency),),
            "trace_file": ("" if self._traces.file is None else str(self._traces.file),),
            "trace_mode": (str(self._traces.mode),),
        }
        for key, values in told.items():
            response.settings[key].value.extend(values)
        return response


def _number(key: str, values: Sequence[str], least: int) -> int:
    if len(values) != 1:
        raise InvalidArgument(f"Unable to parse '{key}', expecting one value, got: {len(values)}")
    text = values[0]
    number = int(text) if _WHOLE.fullmatch(text) else None
    if number is not None and least < 0 and number < least:
        raise InvalidArgument(f"Unable to parse '{key}'. Expecting value >= {least}, got: {number}")
    if number is None or not least <= number <= NUMBER_MAX:
        raise InvalidArgument(f"Unable to parse '{key}', got: {text[:80]}")
    return number

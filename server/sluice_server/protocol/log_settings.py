"""The RPC LogSettings: what is logged and how, told and changed while the server runs (compatibility, section 15)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.errors import InvalidArgument, Unimplemented
from sluice_server.observability.logs import FORMATS

if TYPE_CHECKING:
    from sluice_server.observability.logs import LogControl
    from sluice_server.security.control import ControlPolicy
    from sluice_server.transport.call import Call

_FIELDS = {
    "log_info": ("info", "bool_param"),
    "log_warning": ("warning", "bool_param"),
    "log_error": ("error", "bool_param"),
    "log_verbose_level": ("verbose_level", "uint32_param"),
    "log_format": ("format", "string_param"),
}
"""Setting -> its field of LogOptions, and the kind of its values."""


class LogSettings:
    """Answers LogSettings. A setting without a value goes back to the start's; unknown ones are passed over."""

    def __init__(self, logs: LogControl, control: ControlPolicy) -> None:
        self._logs = logs
        self._control = control

    def answer(self, request: Any, call: Call) -> pb.LogSettingsResponse:
        """Change what the request names, all of it or nothing, and tell every setting.

        `InvalidArgument`: a value; `Unimplemented`: the file; `PermissionDenied`: a change by a peer that may not
        control the server.
        """
        if request.settings:
            self._control.check("a change by LogSettings", call.peer)
            self._logs.change(_changes(request.settings))
        return self._tell()

    def _tell(self) -> pb.LogSettingsResponse:
        options = self._logs.options
        response = pb.LogSettingsResponse()
        response.settings["log_file"].string_param = "" if options.file is None else str(options.file)
        for key, (field, kind) in _FIELDS.items():
            setattr(response.settings[key], kind, getattr(options, field))
        return response


def _changes(settings: Any) -> dict[str, Any]:
    if "log_file" in settings:
        raise Unimplemented("log file location can not be updated through network protocol")
    changes: dict[str, Any] = {}
    for key, (field, expected) in _FIELDS.items():
        if key not in settings:
            continue
        kind = settings[key].WhichOneof("parameter_choice")
        if kind not in (None, expected):
            raise InvalidArgument(f"invalid value type for '{key}', expected {expected}")
        changes[field] = None if kind is None else getattr(settings[key], expected)
    if changes.get("format") not in (None, *FORMATS):
        raise InvalidArgument(
            f"invalid argument for log_format, got: {changes['format'][:80]}; there are {', '.join(FORMATS)}"
        )
    return changes

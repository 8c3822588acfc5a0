"""`--capture-file` and its companions: what they become, and how each wrong value is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice_server.flag_values import SettingsError
from sluice_server.observability.capture import MAX_BYTES_DEFAULT, CaptureOptions
from sluice_server.settings import parse_serve


def parsed(*flags: str) -> CaptureOptions | None:
    return parse_serve(["--model-repository=/models", *flags]).capture


def test_the_file_alone_has_every_request():
    assert parsed("--capture-file=/tmp/c") == CaptureOptions(Path("/tmp/c"), 1.0, MAX_BYTES_DEFAULT, None)


@pytest.mark.parametrize(("flags", "facts"), [
    (["--capture-rate=0.5"], ["--capture-rate needs --capture-file"]),
    (["--capture-max-bytes=5"], ["--capture-max-bytes needs --capture-file"]),
    (["--capture-redact=json:dumps"], ["--capture-redact needs --capture-file"]),
    (["--capture-rate=0"], ["--capture-rate", "above 0 and up to 1, got '0'"]),
    (["--capture-rate=1.01"], ["above 0 and up to 1, got '1.01'"]),
    (["--capture-rate=nan"], ["above 0 and up to 1, got 'nan'"]),
    (["--capture-rate=half"], ["above 0 and up to 1, got 'half'"]),
    (["--capture-max-bytes=0"], ["--capture-max-bytes", "> 0"]),
    (["--capture-file=c", "--capture-max-bytes=28"], ["--capture-max-bytes=28 leaves no room", "28"]),
    (["--capture-redact=json"], ["expected MODULE:FUNCTION, got 'json'"]),
    (["--capture-redact=:f"], ["expected MODULE:FUNCTION"]),
    (["--capture-redact=no_such_module:f"], ["'no_such_module' cannot be imported", "PYTHONPATH"]),
    (["--capture-redact=json:nothing"], ["module json has no 'nothing'"]),
    (["--capture-redact=json:__name__"], ["json:__name__ is no function but a str"]),
])  # fmt: skip
def test_what_is_wrong_is_named(flags, facts):
    with pytest.raises(SettingsError) as caught:
        parsed(*flags)
    for fact in facts:
        assert fact in str(caught.value)

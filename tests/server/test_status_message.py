"""Whether a status message is cut to what gRPC's headers carry, and nothing but its middle is lost."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_server.transport.message import ENCODED_BYTES_MAX, fit_message

UNRESERVED = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


def encoded_bytes(message: str) -> int:
    return len(quote(message, safe=UNRESERVED))


@pytest.mark.parametrize("message", ["", "short", "x" * ENCODED_BYTES_MAX, "\N{KATAKANA LETTER TU}" * 455])
def test_a_message_that_fits_is_left_alone(message):
    assert encoded_bytes(message) <= ENCODED_BYTES_MAX
    assert fit_message(message) is message


@pytest.mark.parametrize("filler", ["x", "%", "\0", "\N{KATAKANA LETTER TU}", "\N{GRINNING FACE}"])
def test_a_long_message_keeps_its_ends_and_says_how_long_it_was(filler):
    message = f"unexpected input '{filler * 100_000}' for model 'm'"
    got = fit_message(message)
    assert got.startswith(f"unexpected input '{filler * 100}")
    assert got.endswith(f"{filler * 100}' for model 'm'")
    assert f"[... {len(message)} characters in all ...]" in got
    assert ENCODED_BYTES_MAX - 24 <= encoded_bytes(got) <= ENCODED_BYTES_MAX


@given(st.text(max_size=50), st.integers(1, 500), st.text(max_size=50))
def test_no_message_is_over_the_limit(head, times, tail):
    got = fit_message((head + "%") * times + tail)
    assert encoded_bytes(got) <= ENCODED_BYTES_MAX

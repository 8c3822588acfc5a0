"""Models that cannot have a response cache are refused at load, with the field and the reason."""

import pytest

from sluice_server.repository.config import parse_text
from sluice_server.repository.errors import ConfigError
from sluice_server.repository.validate import check_config

CACHED = "response_cache { enable: true }"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sequence_batching { direct { } }", "sequence_batching"),
        ('ensemble_scheduling { step { model_name: "part" } }', "ensemble_scheduling"),
        ("model_transaction_policy { decoupled: true }", "decoupled"),
    ],
)
def test_what_is_no_function_of_its_request_cannot_be_cached(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        check_config(parse_text(f"{text} {CACHED}", ""), "m")
    assert caught.value.field == "response_cache.enable"
    check_config(parse_text(text, ""), "m")


def test_a_cache_that_is_off_says_nothing() -> None:
    check_config(parse_text("sequence_batching { } response_cache { enable: false }", ""), "m")

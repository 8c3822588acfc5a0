"""Direct and through Envoy: every request is answered on both ways, and the table says what is added."""

from __future__ import annotations

import re
import shutil

import pytest

from loadtests import via_envoy
from support.server import need


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load (nghttp2-client) is not installed")
def test_it_measures_both_ways_and_what_envoy_adds(capsys):
    need("native")
    assert via_envoy.main(["--rounds=1", "--requests=64"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^  direct +p50 +\d+\.\d+ ms .* Envoy's CPU    0 us$", printed, re.MULTILINE)) == 2
    assert len(re.findall(r"^  Envoy +p50 +\d+\.\d+ ms ", printed, re.MULTILINE)) == 2
    assert len(re.findall(r"^  Envoy adds -?\d+\.\d+ ms to p50", printed, re.MULTILINE)) == 2

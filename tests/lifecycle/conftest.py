"""The commands in this process: what they print, what they return, and what they leave behind."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import pytest

from sluice_server.observability.logs import HANDLER_NAME, OWN_LOGGERS

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def own_process() -> Iterator[None]:
    """Undo what `sluice serve` configures for its whole process."""
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, OWN_LOGGERS)]
    levels = [logger.level for logger in loggers]
    switch_interval_s = sys.getswitchinterval()
    yield
    sys.setswitchinterval(switch_interval_s)
    for handler in [handler for handler in root.handlers if handler.get_name() == HANDLER_NAME]:
        root.removeHandler(handler)
        handler.close()
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)

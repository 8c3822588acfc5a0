"""The model repository: what lies on disk, what a configuration means, and which version is served."""

from sluice_server.repository.autocomplete import complete, normalize
from sluice_server.repository.config import parse_json, parse_text, read_config
from sluice_server.repository.describe import explain
from sluice_server.repository.errors import ConfigError, ModelLoadError
from sluice_server.repository.layout import (
    ModelDirectory,
    Repositories,
    check_model_name,
    read_directory,
    write_override,
)
from sluice_server.repository.validate import check_devices, unit_tensors
from sluice_server.repository.versions import parse_version, select

__all__ = [
    "ConfigError",
    "ModelDirectory",
    "ModelLoadError",
    "Repositories",
    "check_devices",
    "check_model_name",
    "complete",
    "explain",
    "normalize",
    "parse_json",
    "parse_text",
    "parse_version",
    "read_config",
    "read_directory",
    "select",
    "unit_tensors",
    "write_override",
]

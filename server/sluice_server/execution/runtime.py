"""Everything that is global to ONNX Runtime in this process: what it can do, and how much it says."""

import onnxruntime

WARNING, ERROR, FATAL = 2, 3, 4
"""ONNX Runtime's log severities; a message is written when its severity is at least the one that is set."""


def configure_runtime(log_severity: int = ERROR) -> None:
    """Turn telemetry off and set what ONNX Runtime writes to stderr outside of any session."""
    onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(log_severity)


def runtime_version() -> str:
    """Give the version of the ONNX Runtime that is loaded."""
    return str(onnxruntime.__version__)


def available_providers() -> tuple[str, ...]:
    """Give the execution providers that this build knows.

    Knowing one is not having it: the GPU build lists CUDA on a machine without a GPU. What a model runs on is read
    back from its session.
    """
    return tuple(onnxruntime.get_available_providers())

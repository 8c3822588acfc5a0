"""The HTTP front: health, readiness and metrics."""

"""Statistics, metrics, logs and traces."""

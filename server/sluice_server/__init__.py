"""The Sluice inference server."""

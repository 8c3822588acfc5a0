"""Measures the server under load: `python -m loadtests.bench`, from the root of the repository."""

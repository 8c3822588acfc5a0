"""Which transport is chosen: what was asked for against what is installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sluice_server.transport.choice import Chosen, TransportChoice, TransportUnavailable, choose, native_problem

MISSING = "it is not installed"


def importing(result):
    """An import that gives a module, or raises."""

    def import_module(name):
        assert name == "sluice_native"
        if isinstance(result, Exception):
            raise result
        return result

    return import_module


def test_a_module_of_the_servers_version_is_used():
    assert native_problem("1.2.3", importing(SimpleNamespace(__version__="1.2.3"))) == ""


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (ModuleNotFoundError("no module", name="sluice_native"), MISSING),
        (ModuleNotFoundError("No module named 'other'", name="other"), "it cannot be loaded: No module named 'other'"),
        (ImportError("wrong ELF class"), "it cannot be loaded: wrong ELF class"),
        (SimpleNamespace(__version__="1.2.2"), "the one that is installed is version 1.2.2 and the server 1.2.3"),
    ],
    ids=["missing", "dependency", "broken", "version"],
)
def test_a_module_that_cannot_be_used_says_why(result, problem):
    assert native_problem("1.2.3", importing(result)) == problem


@pytest.mark.parametrize("choice", [TransportChoice.AUTO, TransportChoice.NATIVE])
def test_the_native_one_is_taken_where_it_can_be(choice):
    assert choose(choice, "", ["--grpc-max-connections"]) == Chosen("native")


def test_grpcio_is_taken_when_asked_for_without_a_word():
    for problem in ("", MISSING):
        assert choose(TransportChoice.GRPCIO, problem) == Chosen("grpcio")


def test_grpcio_instead_of_the_native_one_says_what_that_costs_and_how_to_get_the_other():
    chosen = choose(TransportChoice.AUTO, MISSING)
    assert chosen.name == "grpcio"
    for fact in ("grpcio", "ten times the CPU", MISSING, "pip install ./server/native", "cargo"):
        assert fact in chosen.notice
    assert "\n" not in chosen.notice


def test_the_native_one_asked_for_and_missing_is_an_error_with_the_command():
    with pytest.raises(TransportUnavailable, match=r"--transport=native .*not installed.*pip install ./server/native"):
        choose(TransportChoice.NATIVE, MISSING)


def test_a_bound_that_grpcio_cannot_keep_is_not_dropped_silently():
    with pytest.raises(TransportUnavailable, match=r"--grpc-max-connections needs .*not installed.*pip install"):
        choose(TransportChoice.AUTO, MISSING, ["--grpc-max-connections"])

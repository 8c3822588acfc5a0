"""The client's public face: complete, the same for both clients, importable alone."""

import inspect
import pickle
import subprocess
import sys

import pytest

import sluice_client
from sluice_client import AsyncClient, AsyncInferStream, Client, InferStream, ServerError, errors


def test_all_is_sorted_and_names_every_public_thing() -> None:
    public = {
        name
        for name, value in vars(sluice_client).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "version"
    }
    assert sluice_client.__all__ == sorted(sluice_client.__all__)
    assert set(sluice_client.__all__) == public | {"__version__"}


def test_every_exception_is_public_and_drawn_in_the_tree() -> None:
    classes = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]
    assert {cls.__name__ for cls in classes} <= set(sluice_client.__all__)
    assert all(cls.__name__ in (errors.__doc__ or "") for cls in classes)
    assert len(errors.BY_CODE) == 16


@pytest.mark.parametrize(("blocking", "asynchronous"), [(Client, AsyncClient), (InferStream, AsyncInferStream)])
def test_both_clients_have_the_same_methods_with_the_same_parameters_in_the_same_order(
    blocking: type, asynchronous: type
) -> None:
    def methods(cls: type) -> dict[str, list[inspect.Parameter]]:
        functions = inspect.getmembers(cls, inspect.isfunction)
        return {
            name: list(inspect.signature(function).parameters.values())
            for name, function in functions
            if not name.startswith("_") or name == "__init__"
        }

    assert methods(blocking) == methods(asynchronous)


@pytest.mark.parametrize("cls", errors.BY_CODE.values())
def test_a_server_error_survives_pickling_with_its_facts(cls: type[ServerError]) -> None:
    error = cls("queue is full", "digits", "localhost:8001", 3, 0.25)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), vars(copy), str(copy)) == (cls, vars(error), str(error))
    assert str(error) == f"{cls.code}: queue is full [localhost:8001, model 'digits', 3 attempts]"


def test_the_client_needs_neither_the_server_nor_its_packages() -> None:
    script = (
        "import sys, sluice_client.cli; "
        "print([m for m in ('sluice_server', 'sluice_batching', 'onnxruntime', 'opentelemetry', 'google.rpc') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

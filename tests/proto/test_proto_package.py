"""The package's front door lists all there is, in order."""

import pkgutil

import sluice_proto
from sluice_proto import errors


def test_all_is_sorted_without_repeats_and_every_name_is_there():
    constants_classes_rest = sorted(
        set(sluice_proto.__all__), key=lambda name: (not name.isupper(), name.islower(), name)
    )
    assert sluice_proto.__all__ == constants_classes_rest
    assert all(hasattr(sluice_proto, name) for name in sluice_proto.__all__)


def test_every_module_and_every_error_is_listed():
    modules = {module.name for module in pkgutil.iter_modules(sluice_proto.__path__)} - {"pool"}
    tree = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(sluice_proto.__all__) == modules | tree | {"POOL"}


def test_every_error_is_drawn_in_the_tree_of_its_module():
    tree = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert [name for name in tree if name not in (errors.__doc__ or "")] == []
    assert all(issubclass(getattr(errors, name), errors.ProtoError) for name in tree)

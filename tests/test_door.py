"""The front door: few names, rooms that open when they are used, old names that still work."""

import importlib
import subprocess
import sys

import pytest

import priorityprop_jax as pp
from priorityprop_jax import _renamed


def run(code):
    """What a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_nothing_else():
    heavy = ("jax", "flax", "optax", "orbax", "matplotlib", "numpy")
    code = f"import sys, priorityprop_jax; print([m for m in {heavy} if m in sys.modules])"
    assert run(code).strip() == "[]"


def test_a_transformation_needs_no_flax_module():
    code = (
        "import sys; from priorityprop_jax import priorityprop, partial; "
        "print([m for m in ('flax.linen', 'orbax.checkpoint', 'matplotlib') if m in sys.modules])"
    )
    assert "orbax" not in run(code) and "matplotlib" not in run(code)


def test_every_name_and_room_is_there():
    assert set(pp.__all__) == set(pp._ROOM_OF)
    for name in pp.__all__:
        assert name in dir(pp)
        assert getattr(pp, name) is getattr(getattr(pp, pp._ROOM_OF[name]), name)
    for room in pp._ROOMS:
        assert room in dir(pp)
        assert getattr(pp, room) is importlib.import_module(f"priorityprop_jax.{room}")


@pytest.mark.parametrize("name", _renamed.MOVED)
def test_old_names_work_and_say_where_they_went(name):
    with pytest.warns(DeprecationWarning, match=f"{name} is now priorityprop_jax.") as caught:
        value = getattr(pp, name)
    room, _, new = _renamed.MOVED[name].rpartition(".")
    assert value is getattr(importlib.import_module(f"priorityprop_jax.{room}"), new)
    assert caught[0].filename == __file__
    assert name not in vars(pp)  # so that the next use warns too


@pytest.mark.parametrize("name", _renamed.GONE)
def test_names_that_are_gone_say_what_to_use(name):
    with pytest.raises(AttributeError, match=f"{name} is gone: "):
        getattr(pp, name)


def test_other_names_are_attribute_errors():
    assert not hasattr(pp, "never_been")
    with pytest.raises(ImportError, match="never_been"):
        exec("from priorityprop_jax import never_been")


def test_no_old_name_hides_a_new_one():
    assert not {*_renamed.MOVED, *_renamed.GONE} & {*pp.__all__, *pp._ROOMS}
    assert not set(_renamed.MOVED) & set(_renamed.GONE)

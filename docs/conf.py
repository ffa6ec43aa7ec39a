"""The site: Sphinx with MyST, from docs/ and the docstrings. Loads nothing from elsewhere."""

import importlib
import inspect
import os
import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util import logging

import priorityprop_jax

project = "priorityprop_jax"
author = "The priorityprop_jax authors"
project_copyright = author
release = version = priorityprop_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"  # `name` in a docstring is a link where there is such a name
add_module_names = False
python_use_unqualified_type_names = True
autodoc_typehints = "none"  # docstrings say shapes and units; the aliases of arrays are long
autodoc_member_order = "bysource"
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Names of other libraries become links only when asked for, as their lists must be fetched.
intersphinx_mapping = {}
if os.environ.get("DOCS_INTERSPHINX"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }

html_theme = "sphinx_book_theme"
html_title = project
html_math_renderer = "mathml"
html_copy_source = False
html_theme_options = {"use_download_button": False, "show_toc_level": 2}

ROOMS = (
    "core", "priority", "partial", "exact", "rnn", "highway", "meprop", "sparse", "training",
    "models",
)  # fmt: skip
NAMES = re.compile(r"^:::\{names\} (\w+)\n(.*?)^:::$", re.MULTILINE | re.DOTALL)
log = logging.getLogger(__name__)


def names_on(text):
    """The names that a page of the reference shows, as `room.name`, in its order."""
    return [f"{room}.{name}" for room, listed in NAMES.findall(text) for name in listed.split()]


def public_names():
    """What the doors of the rooms list."""
    rooms = {room: importlib.import_module(f"priorityprop_jax.{room}") for room in ROOMS}
    return [f"{room}.{name}" for room, door in rooms.items() for name in door.__all__]


def show_names(app, page, source):
    """`:::{names} room` becomes a table of the names in it, and what each docstring says."""

    def entry(room, name):
        thing = getattr(importlib.import_module(f"priorityprop_jax.{room}"), name)
        doors = [importlib.import_module(f"priorityprop_jax.{other}") for other in ROOMS]
        first = next(door for door in doors if getattr(door, name, None) is thing)
        kind, options = "function" if callable(thing) else "data", []
        if inspect.isclass(thing):
            kind = "exception" if issubclass(thing, Exception) else "class"
            options = [":members:"] if kind == "class" else []
        if first.__name__ != f"priorityprop_jax.{room}":  # links lead to one place
            options.append(":no-index:")
        return "\n   ".join([f".. auto{kind}:: {name}", *options]) + "\n"

    def both(match):
        room, listed = match[1], match[2].split()
        table = "\n   ".join([".. autosummary::", ":nosignatures:", "", *listed])
        entries = "\n".join(entry(room, name) for name in listed)
        module = f".. currentmodule:: priorityprop_jax.{room}"
        return f"````{{eval-rst}}\n{module}\n\n{table}\n\n{entries}\n````"

    source[0] = NAMES.sub(both, source[0])


def skip(app, what, name, thing, skipped, options):
    """Fields of a NamedTuple are told in its docstring."""
    return True if (inspect.getdoc(thing) or "").startswith("Alias for field number") else None


def find_name(app, env, node, content):
    """Resolves names without their whole path: `allocate`, `partial.step`, `pp.partial.step`."""
    if node.get("refdomain") != "py":
        return None
    asked = re.sub(r"^(pp|priorityprop_jax)\.", "", node["reftarget"])
    domain = env.get_domain("py")
    wanted = {f"priorityprop_jax.{name}" for name in (asked, *(f"{r}.{asked}" for r in ROOMS))}
    found = [name for name in domain.objects if name in wanted]
    # The same name in the room of the text that asks comes before those of other rooms.
    found.sort(key=lambda name: not name.startswith(f"{node.get('py:module')}."))
    if found:
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, content)
    if node["reftarget"].startswith("pp."):
        log.warning("no such name: %s", node["reftarget"], location=node)
    return None


def mathml(formula, display):
    """A formula as browsers draw it without a script."""
    if r"\\" in formula:
        formula = rf"\begin{{align*}}{formula}\end{{align*}}"
    return convert(formula, display=display)


def inline_math(writer, node):
    """Writes a formula within a line."""
    writer.body.append(mathml(node.astext(), "inline"))
    raise SkipNode


def block_math(writer, node):
    """Writes a formula on lines of its own."""
    writer.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise SkipNode


def setup(app):
    """What this file adds to Sphinx."""
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("source-read", show_names)
    app.connect("autodoc-skip-member", skip)
    app.connect("missing-reference", find_name)

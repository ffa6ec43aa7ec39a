"""What the build of the site does beside Material and mkdocstrings: formulas, tables, checks."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import priorityprop_jax

ROOT = Path(__file__).parents[1]


def undocumented(pages: str) -> list[str]:
    """The public names that the text of the API's pages does not show exactly once."""
    shown = re.findall(r"^::: priorityprop_jax\.(\w+)$", pages, re.MULTILINE)
    return sorted(
        {name for name in priorityprop_jax.__all__ if shown.count(name) != 1}
        | set(shown).difference(priorityprop_jax.__all__)
    )


def measured(name: str) -> str:
    """The tables of the README between the markers of this name, which its tests keep true."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", readme, re.DOTALL)
    if not found:
        raise PluginError(f"README.md has no tables between the markers of {name!r}")
    return found[1]


def on_files(files, *, config):
    """Refuses a reference with gaps, and puts the report's pictures beside the report."""
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    if names := undocumented(pages):
        raise PluginError(f"not exactly once under docs/api, or not public: {', '.join(names)}")
    for picture in sorted((ROOT / "benchmarks/results/report").glob("*.png")):
        where = f"report/{picture.name}"
        files.append(File.generated(config, where, abs_src_path=str(picture)))


def on_page_markdown(markdown, **_):
    """Puts measured tables where a page asks for them."""
    return re.sub(r"<!-- measured: (\w+) -->", lambda match: measured(match[1]), markdown)


def on_page_content(content, **_):
    r"""Turns formulas into MathML, which browsers draw without a script."""

    def draw(match: re.Match) -> str:
        inline = match[1] == "span"
        formula = html.unescape(match[2]).strip()
        if r"\\" in formula:
            formula = rf"\begin{{align*}}{formula}\end{{align*}}"
        return convert(formula, display="inline" if inline else "block")

    wrapped = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>'
    return re.sub(wrapped, draw, content, flags=re.DOTALL)

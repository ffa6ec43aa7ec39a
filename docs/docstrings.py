"""Docstrings are read in terminals and by Sphinx's rules; here they become the site's Markdown."""

import inspect
import re
from typing import Any

import griffe

import priorityprop_jax


def to_markdown(text: str) -> str:
    """Formulas and links of reStructuredText as Markdown, and public names as links."""
    text = re.sub(r"^( *)\.\. math::((?:.*)(?:\n+\1 +.*)*)", _block, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]*)`", lambda match: f"${' '.join(match[1].split())}$", text)
    text = re.sub(r"(?<!`)`([^`<]+?)\s+<(https?://[^>]+)>`__?", r"[\1](\2)", text)
    # Griffe knows the plural as the section of doctests
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return re.sub(r"(?<![`\[])`(\w+)([\w.]*)`(?!`)", _link, text)


def _block(match: re.Match[str]) -> str:
    formula = inspect.cleandoc(match[2]).strip()
    return "\n".join(match[1] + line for line in ["$$", *formula.splitlines(), "$$"])


def _link(match: re.Match[str]) -> str:
    if match[1] not in priorityprop_jax.__all__:
        return match[0]
    return f"[{match[0]}][priorityprop_jax.{match[1]}]"


class Markdown(griffe.Extension):
    """Griffe's hook: every docstring, once, when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)

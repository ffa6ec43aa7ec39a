"""The documentation site: its code runs, its commands exist, it builds, and it loads nothing."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import priorityprop_jax
from priorityprop_jax.cli import main as cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def blocks(page, language):
    """The code blocks of a page in one language, each with the line that it begins at."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def load(name):
    """A module of `docs/`, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Its programs need packages that may be absent: tests/training/test_other_trainers.py runs them.
ELSEWHERE = {"guides/other-trainers.md"}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page not in ELSEWHERE]
)
def test_examples_run(page):
    namespace = {"__name__": page}
    for line, code in blocks(page, "python"):
        # Empty lines in front make the line numbers of a traceback those of the page.
        exec(compile("\n" * line + code, DOCS / page, "exec"), namespace)


def check_command(words):
    """Refuses a command that does not exist, or that would not take these arguments."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    match words:
        case ["priorityprop", *arguments]:
            cli._parser().parse_args(arguments)
        case ["pip", "install", "-e", target]:
            extra = re.fullmatch(r"\.\[(\w+)\]", target)[1]
            assert extra in extras["optional-dependencies"]
        case ["python", "-m", module, *_]:
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case _:
            raise AssertionError(f"unknown to this test: {shlex.join(words)}")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_commands_exist(page):
    for _, script in blocks(page, "bash"):
        for command in re.split(r"\n|&&", script.replace("\\\n", " ")):
            if words := shlex.split(command, comments=True):
                check_command(words)


def test_unknown_commands_are_refused():
    for command in ["priorityprop train --tusk digits", "python -m benchmarks.none", "rm -r x"]:
        with pytest.raises((AssertionError, SystemExit)):
            check_command(command.split())


def test_no_block_escapes_the_tests():
    for page in PAGES:
        fences = re.findall(
            r"^ *(`{3,}|~{3,})(.*)$", (DOCS / page).read_text("utf-8"), re.MULTILINE
        )
        opened = [language for _, language in fences[::2]]
        assert set(opened) <= {"python", "bash", "text"}, page
        known = sum(len(blocks(page, language)) for language in {"python", "bash", "text"})
        assert len(opened) == known, page


@pytest.mark.once
def test_every_public_name_is_in_the_reference_once():
    conf = load("conf")
    text = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    assert sorted(conf.names_on(text)) == sorted(conf.public_names())
    flat = set(priorityprop_jax.__all__)
    assert flat <= {name.partition(".")[2] for name in conf.public_names()}


@pytest.mark.once
def test_words_are_those_of_a_user():
    pages = [ROOT / "README.md", *(DOCS / page for page in PAGES)]
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"\b(?:bars?|met|missed|goals?)\b", text, re.IGNORECASE) == [], path


@pytest.mark.once
def test_pictures_are_those_of_their_script(tmp_path):
    load("pictures").write(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "img").iterdir()}
    shown = "".join((DOCS / page).read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in drawn if f"img/{name}" not in shown] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as a release would; a warning fails it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", DOCS, folder]
    environment = {key: value for key, value in os.environ.items() if key != "DOCS_INTERSPHINX"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.once
def test_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe|source|object)\b[^>]*>", html)
        assert [tag for tag in loaded if re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag)] == []
        assert not re.search(r"@import|url\([\"']?(?:https?:)?//", html)
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()[\"' ]*(?:https?:)?//", style.read_text("utf-8"))


@pytest.mark.once
def test_formulas_tables_and_links_are_drawn(site):
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.search(
            r"<merror|mathjax(?!_ignore)|:math:|\.\. math::|:::|\{names\}", html
        ), page
    reference = (site / "api/priority.html").read_text(encoding="utf-8")
    assert "<math" in reference and "<table" in reference
    # A bare name in a docstring, and a name of the front door, lead to the room's own entry
    assert 'href="#priorityprop_jax.priority.Ledger.from_dict"' in reference
    assert 'href="core.html#priorityprop_jax.core.find_slots"' in reference
    assert "<table" in (site / "evidence.html").read_text(encoding="utf-8")

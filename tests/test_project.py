"""The promises of the project's own files: bounds, set-up commands, citation."""

import pathlib
import re
import tomllib

import pytest
import yaml

import priorityprop_jax

ROOT = pathlib.Path(__file__).parents[1]
SETUP_COMMANDS = (
    'pip install -e ".[demo]" && priorityprop train',
    'pip install -e ".[test]" && pytest',
)


def project_table():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def split_requirement(requirement, operator):
    """Splits `name[extras]>=1.2` into `("name", "1.2")`; nothing else is allowed."""
    pattern = r"([A-Za-z0-9._-]+)(?:\[[\w,-]+\])?" + re.escape(operator) + r"([0-9][\w.]*)"
    match = re.fullmatch(pattern, requirement)
    assert match, f"{requirement!r} is not of the form name{operator}version"
    return match[1].lower(), match[2]


def test_lower_bounds_are_the_pins_that_ci_installs():
    project = project_table()
    extras = project["optional-dependencies"]
    requirements = {  # A set: `finetune` and `test` share some.
        requirement
        for requirement in [
            *project["dependencies"],
            *extras["demo"],
            *extras["finetune"],
            *extras["docs"],
            *extras["test"],
        ]
        if not requirement.startswith(f"{project['name']}[")  # an extra that includes another
    }
    bounds = [split_requirement(requirement, ">=") for requirement in requirements]

    lines = (ROOT / ".ci" / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = [split_requirement(line, "==") for line in lines if line and not line.startswith("#")]

    assert sorted(bounds) == sorted(pins)


def test_version_is_the_cited_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == priorityprop_jax.__version__


def test_package_is_marked_as_typed():
    assert (ROOT / "priorityprop_jax" / "py.typed").is_file()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
@pytest.mark.parametrize("command", SETUP_COMMANDS)
def test_setup_command_is_given_once(name, command):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count(command) == 1


def test_contributing_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = re.findall(r"python -m (benchmarks[\w.]*)", text)
    places = [ROOT / module.replace(".", "/") for module in modules]
    paths = [f"{p}/__main__.py" if p.is_dir() else f"{p}.py" for p in places]
    paths += re.findall(r"tests/[\w/]+\.py", text)
    assert modules and len(paths) > len(modules)
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_citation_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
    cited = {
        identifier["value"]
        for reference in citation["references"]
        for identifier in reference.get("identifiers", ())
    }
    assert cited == {"arXiv:1706.06197", "arXiv:2302.04852", "arXiv:2501.17086"}

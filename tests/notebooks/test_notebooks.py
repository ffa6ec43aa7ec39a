"""Every notebook runs from a fresh kernel in a folder of its own, and shows what it speaks of."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
FINETUNE = "02_finetune_on_a_budget"


def marks(stem):
    if stem.startswith("01"):
        return []
    needed = ("safetensors", "tokenizers") if stem == FINETUNE else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    reason = f"{missing} of priorityprop-jax[finetune] is not installed"
    return [pytest.mark.once, pytest.mark.skipif(bool(missing), reason=reason)]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Where the kernels keep what they compile, as notebooks compile much of it twice."""
    return tmp_path_factory.mktemp("programs")


def execute(path, folder):
    """Runs a notebook on its small settings; returns what it printed and its pictures."""
    notebook = nbformat.read(path, as_version=4)
    for i, cell in enumerate(notebook.cells):
        if "parameters" in cell.metadata.get("tags", []):
            notebook.cells.insert(i + 1, nbformat.v4.new_code_cell(SMALL[path.stem]))
            break
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(o["text"] for o in outputs if o.get("name") == "stdout")
    warned = "".join(o["text"] for o in outputs if o.get("name") == "stderr")
    assert "Warning" not in warned, warned
    return printed, [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=marks(path.stem)) for path in NOTEBOOKS]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_runs(path, programs, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))
    # Nearly all of the time goes to the compiler.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if path.stem == FINETUNE:
        from tests.cli.test_decoders import write_tiny

        write_tiny(tmp_path / "tiny")
    check, pictures = CHECKS.get(path.stem, (lambda *_: None, 1))
    printed, shown = execute(path, tmp_path)
    check(printed, tmp_path)
    assert len(shown) >= pictures and all(len(picture) > 5_000 for picture in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_fit_to_be_published(path):
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    check_install(first.source, path.parent)
    assert notebook.cells[-1].cell_type == "markdown"
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#:]+)\)", cell.source):
                assert (path.parent / target).exists(), target


def check_install(source, folder):
    """Runs the cell where the package is missing; what it asks pip for is this checkout."""
    asked = []

    def magic(name, line):
        asked.append([name, *shlex.split(line)])

    def missing(name, *_):
        raise ImportError(f"No module named {name!r}")

    shell = SimpleNamespace(run_line_magic=magic)
    names = {"get_ipython": lambda: shell, "__builtins__": {"ImportError": ImportError}}
    names["__builtins__"]["__import__"] = missing
    exec(TransformerManager().transform_cell(source), names)
    [(*command, target)] = asked
    assert command == ["pip", "install", "-q", "-e"]
    place, extra = re.fullmatch(r"(.+)\[(\w+)\]", target).groups()
    project = (folder / place).resolve() / "pyproject.toml"
    extras = tomllib.loads(project.read_text("utf-8"))["project"]["optional-dependencies"]
    assert project == folder.parent.resolve() / "pyproject.toml" and extra in extras


def numbers(pattern, printed):
    """What the groups of a pattern matched, as numbers: a tuple for each place."""
    found = re.finditer(pattern, printed, re.MULTILINE)
    return [tuple(float(n.replace(",", "")) for n in match.groups()) for match in found]


def check_quickstart(printed, folder):
    plain, budgeted = numbers(r"validation accuracy (\S+)%, (\S+) updates", printed)
    assert plain[0] > 85 and budgeted[0] > 85
    assert plain[1] == budgeted[1] > 0
    [(updates,)] = numbers(r"^total +(\S+) +100\.0%", printed)
    assert updates == plain[1]
    assert "compiled 1 time" in printed
    assert (folder / "priorities.png").stat().st_size > 5_000


def check_finetune(printed, folder):
    assert "4 blocks" in printed and "labels ['billing', 'delivery', 'fault', 'praise']" in printed
    found = numbers(r": dev accuracy (\S+)%, loss (\S+); \d+ ms a step here, .* (\S+) MB", printed)
    (top, _, state), (_, _, lisa), (_, _, lora) = found
    assert 0 <= top <= 100 and 0 < state < lisa and lora > 0
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert str(names) in printed


def check_meprop_and_sparse(printed, folder):
    few = numbers(r"^meprop, (\d+)% kept: .* accuracy (\S+)%", printed)
    assert [kept for kept, _ in few] == [10, 30] and all(right > 40 for _, right in few)
    (one, _), (two, _) = numbers(r"^layers/\d: (\d+) of (\d+) features kept", printed)[:2]
    assert one + two < 2 * 0.3 * 128
    assert len(numbers(r"^layers/[01] +(95\.0)% +(\S+) +(\S+) +\w+", printed)) == 2
    [(dense,)] = numbers(r"^trained, dense: accuracy (\S+)%", printed)
    [(pruned,)] = numbers(r"^pruned: accuracy (\S+)%", printed)
    [(tuned,)] = numbers(r"^pruned, tuned .*: accuracy (\S+)%", printed)
    assert dense > 80 and pruned < tuned and tuned > 60
    [(sparse,)] = numbers(r"^sparse from the start: accuracy (\S+)%", printed)
    assert sparse > 30


def check_highway(printed, folder):
    [(apart,)] = numbers(r"differ by (\S+) at most", printed)
    assert 0 < apart < 1e-5
    arms = ["plain", "lean", "highway, k = 1", "highway, k = 2"]
    assert re.findall(r"^(.+): \S+ ms a step, \S+x of plain", printed, re.M) == arms
    tables = numbers(r"^all +(\S+) +(\S+) +\S+ +\S+", printed)
    assert len(tables) == 2 and all(0.9 < one < two <= 1 for one, two in tables)
    fresh, trained = numbers(r"^\w+: (\d) of 8 rounds kept", printed)
    assert fresh == (8,) and 0 <= trained[0] <= 8


# What takes the place of the settings in the cell that is tagged `parameters`.
SMALL = {
    FINETUNE: "MODEL, LAST, ROWS, BATCH, LENGTH = 'tiny', 1, 32, 8, 24",
    "03_meprop_and_sparse": "WIDTH, EPOCHS, KEPT, BUDGET = 128, 2, (0.1, 0.3), 0.2",
    "04_highway_and_gradient_quality": "WIDTH, BATCH, STEPS, DEPTH = 16, 4, 24, 12",
}
# What a notebook must have printed and written, and how many pictures it shows at least.
CHECKS = {
    "01_quickstart": (check_quickstart, 2),
    FINETUNE: (check_finetune, 1),
    "03_meprop_and_sparse": (check_meprop_and_sparse, 2),
    "04_highway_and_gradient_quality": (check_highway, 4),
}

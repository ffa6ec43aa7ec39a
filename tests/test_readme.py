"""The README's examples, pasted as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
PRINTED = [
    "100.0%",
    "[",
    "4 of 5 steps began at the last block",
    "1 layer changed",
    "layers/0     95.0%",
    "1 RNN changed",
]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number, capsys):
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})
    printed = capsys.readouterr().out
    assert PRINTED[number] in printed


def test_there_are_examples():
    assert len(EXAMPLES) == len(PRINTED)

"""The words are true: Python blocks of README and docs run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = [
    (path.relative_to(ROOT).as_posix(), number, code)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize(("path", "number", "code"), BLOCKS, ids=[f"{p}-{n}" for p, n, _ in BLOCKS])
def test_docs__python_blocks_run(path, number, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{path}[{number}]", "exec"), {"__name__": "docs"})


def test_readme__names_the_two_commands_and_the_terms():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for words in ("make demo", "make test", "CC BY-NC-SA 4.0", "docs/report.png", "not claimed"):
        assert words in text
    assert (ROOT / "docs" / "report.png").is_file()

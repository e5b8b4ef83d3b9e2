"""The README's example runs as it stands, and its commands are commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sim.cli import cli


def test_the_five_calls_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})  # the README's own words
    assert re.fullmatch(r"\d+\.\d ms, \d+\.\d\d GiB\n", capsys.readouterr().out)
    assert (tmp_path / "opt-125m.pt.trace.json.gz").exists()


def test_every_command_in_the_readme_exists(root: Path) -> None:
    named = set(re.findall(r"^    tracesim (\w+)", (root / "README.md").read_text(), re.MULTILINE))
    assert named and named <= set(cli.commands)


def test_every_linked_page_exists(root: Path) -> None:
    for page in [root / "README.md", *(root / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

"""The README's example runs as it stands, and its commands are commands."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from sim.cli import cli
from tools import demo


def test_the_five_calls_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})  # the README's own words
    assert re.fullmatch(r"\d+\.\d ms, \d+\.\d\d GiB\n", capsys.readouterr().out)
    assert (tmp_path / "opt-125m.pt.trace.json.gz").exists()


@pytest.mark.slow
def test_make_demo_prints_what_the_readme_says(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (told,) = re.findall(r"What `make demo` prints:\n\n((?:    .*\n)+)", (root / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    demo.main()
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line.rstrip() for line in textwrap.dedent(told).splitlines()] == printed[: len(told.splitlines())]


def test_every_command_in_the_readme_is_one(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are options and their values can be; that the commands do what they say is tested elsewhere."""
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^    tracesim (.+)$", (root / "README.md").read_text(), re.MULTILINE)
    named = set()
    for name, *args in (shlex.split(line, comments=True) for line in lines):
        cli.commands[name].make_context(name, args)
        named.add(name)
    assert named == set(cli.commands)


def test_every_linked_page_exists(root: Path) -> None:
    for page in [root / "README.md", *(root / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_file_that_a_page_names_exists(root: Path) -> None:
    for page in [root / "README.md", *(root / "docs").glob("*.md")]:
        for named in re.findall(r"`((?:sim|tools|tests|traces|topologies)/[\w./-]+)`", page.read_text()):
            assert (root / named).exists(), f"{page.name} names {named}"

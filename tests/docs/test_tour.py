"""The tour of the command line: its programs are written, its commands run, and they print what the page shows."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from samplers.cli.commands import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "command-line.md"
# A file by its name, or commands behind a $ with what they print.
BLOCK = re.compile(r'^```(python title="(?P<file>[\w.]+)"|console)\n(?P<body>.*?)^```$', re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
# The page shows this folder instead of the temporary one.
FOLDER = "/home/me/tour"
LOSS = re.compile(r"(?<=loss )\d+\.\d+")


class Tour:
    """A folder in which the blocks of a page are carried out one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.status = folder, 0

    def page(self, text: str) -> str:
        """The page with what its commands print now."""
        return BLOCK.sub(self._carry_out, text)

    def _carry_out(self, block: re.Match[str]) -> str:
        if block["file"]:
            (self.folder / block["file"]).write_text(block["body"])
            return block[0]
        printed = COMMAND.sub(lambda found: f"$ {found[1]}\n{self.run(found[1])}", block["body"])
        return f"```console\n{printed}```"

    def run(self, command: str) -> str:
        """What a command prints, errors too."""
        name, *arguments = shlex.split(command)
        if command == "echo $?":
            return f"{self.status}\n"
        if name == "lengthtrack":
            result = CliRunner().invoke(main, arguments, prog_name=name)
            self.status, printed = result.exit_code, result.output
        else:
            program = {"python": [sys.executable], "ls": ["ls"]}[name]
            done = subprocess.run([*program, *arguments], capture_output=True, text=True, cwd=self.folder, check=False)
            self.status, printed = done.returncode, done.stdout + done.stderr
        return printed.replace(str(self.folder), FOLDER)


def test_the_commands_of_the_tour_print_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = PAGE.read_text()
    printed = Tour(tmp_path).page(shown)
    # Losses are rounded differently from machine to machine.
    assert LOSS.sub("", printed) == LOSS.sub("", shown)
    losses = [[float(loss) for loss in LOSS.findall(text)] for text in (shown, printed)]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)
    assert len(losses[0]) >= 2


def test_every_command_is_on_the_tour() -> None:
    shown = PAGE.read_text()
    assert set(main.commands) <= set(re.findall(r"^\$ lengthtrack (\w+)", shown, re.MULTILINE))

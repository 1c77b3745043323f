"""Whether a checkout may be released: `python tests/support/check_release.py [TAG]`.

The version of pyproject.toml has a section in the changelog with a date and entries, nothing waits under "Unreleased",
the upgrade page tells of it, and saved files of it are kept. With a tag, it is the version's.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def find_problems(root: Path, tag: str = "") -> list[str]:
    """What is not ready."""
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    problems = [] if tag in {"", f"v{version}"} else [f"the tag is {tag}, the version {version}: expected v{version}"]
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        problems.append(f"{version} in pyproject.toml is no version that can be released")
    changes = text(root / "CHANGELOG.md")
    sections = dict(re.findall(r"^## \[([^\]]+)\][^\n]*\n(.*?)(?=^## |\Z)", changes, re.MULTILINE | re.DOTALL))
    if re.search(r"^- ", sections.get("Unreleased", ""), re.MULTILINE):
        problems.append("CHANGELOG.md has entries under Unreleased: move them to the section of the version")
    if not re.search(r"^- ", sections.get(version, ""), re.MULTILINE):
        problems.append(f"CHANGELOG.md has no entries for {version}")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        problems.append(f"CHANGELOG.md has no date for {version}")
    minor = version.rpartition(".")[0]
    if f" to {minor}" not in text(root / "docs" / "upgrade.md"):
        problems.append(f"docs/upgrade.md tells nothing of {minor}")
    if not (root / "tests" / "compatibility" / version / "saved.json").exists():
        problems.append(f"no saved files of {version}: cd tests && python -m compatibility.make {version}")
    return problems


def text(path: Path) -> str:
    """The contents of a file."""
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    found = find_problems(ROOT, *sys.argv[1:2])
    sys.stdout.write("".join(f"{problem}\n" for problem in found) or "ready\n")
    sys.exit(bool(found))

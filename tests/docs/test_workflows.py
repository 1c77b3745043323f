"""Workflows, forms and the notes for a release: they name targets, versions, files and tests that exist."""

import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_release import find_problems

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


def load(path: Path) -> Any:
    # YAML reads the key `on` as true.
    return yaml.safe_load(path.read_text())


WORKFLOWS = {path.name: load(path) for path in sorted((GITHUB / "workflows").glob("*.yml"))}


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for workflow in WORKFLOWS.values():
        yield from workflow["jobs"].items()


def test_each_step_calls_a_make_target_or_a_pinned_action() -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    for name, job in jobs():
        for step in job["steps"]:
            if "run" in step:
                program, *called = step["run"].split()
                assert program == "make", (name, step)
                assert called, (name, step)
                # No variable: a name in the text of a command could be a command.
                assert set(called) <= targets, (name, step)
            else:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), (name, step)
    for path in (GITHUB / "workflows").glob("*.yml"):
        for line in re.findall(r"uses: .*", path.read_text()):
            assert re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_no_job_has_more_rights_than_it_needs() -> None:
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in jobs() if "permissions" in job}
    assert more == {"publish": {"id-token": "write"}, "site": {"contents": "write"}}
    publish = WORKFLOWS["release.yml"]["jobs"]["publish"]
    assert publish["environment"] == "release"
    # What may ask for an identity builds nothing, and runs nothing of the checkout.
    assert not any("run" in step or "checkout" in step["uses"] for step in publish["steps"])
    assert all(job["timeout-minutes"] <= 90 for _, job in jobs())
    text = "".join(path.read_text() for path in GITHUB.rglob("*.yml"))
    assert "secrets." not in text
    assert "pull_request_target" not in text


def test_the_matrix_has_the_versions_of_python_that_are_declared() -> None:
    matrix = WORKFLOWS["tests.yml"]["jobs"]["tests"]["strategy"]["matrix"]
    declared = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", each)]
    assert matrix["python"] == declared
    assert PROJECT["requires-python"] == f">={declared[0]}"
    page = (ROOT / "docs" / "install.md").read_text().partition("## Python and platforms")[2]
    assert set(declared) == set(re.findall(r"\b3\.\d\d\b", page.partition("\n## ")[0]))
    assert {f"{each['os']} {each['python']}" for each in matrix["include"]} == {
        f"{system} {declared[0]}" for system in ("macos-latest", "windows-latest")
    }


def test_each_target_is_in_the_help_of_make() -> None:
    [phony] = re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)
    told = set(re.findall(r'@echo "make ([\w-]+)', MAKEFILE))
    parts = {"help", "format", "lint", "types", "coverage"}
    assert set(phony.split()) - parts == told
    assert set(phony.split()) == set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))


def test_each_tried_version_is_one_line_and_listed_once() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = [re.fullmatch(r"([\w.-]+)==[\w.]+", line)[1].lower() for line in lines]  # type: ignore[index]
    assert len(names) == len(set(names))


def test_the_page_on_security_names_tests_that_exist() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_the_forms_ask_for_what_is_needed_and_repeat_no_id() -> None:
    for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml"):
        form = load(path)
        if path.name != "config.yml":
            ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
            assert len(ids) == len(set(ids))
            assert any(part.get("validations", {}).get("required") for part in form["body"])


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A checkout that may be released."""
    root = tmp_path / "checkout"
    (root / "docs").mkdir(parents=True)
    (root / "tests" / "compatibility" / "3.1.4").mkdir(parents=True)
    (root / "tests" / "compatibility" / "3.1.4" / "saved.json").touch()
    (root / "pyproject.toml").write_text('[project]\nversion = "3.1.4"\n')
    (root / "CHANGELOG.md").write_text(
        "## [Unreleased]\n\n## [3.1.4] - 2031-04-01\n\n- A line.\n\n## [3.1.3] - 2030-01-01\n"
    )
    (root / "docs" / "upgrade.md").write_text("# Upgrading from 3.0 to 3.1\n")
    assert find_problems(root) == find_problems(root, "v3.1.4") == []
    return root


@pytest.mark.parametrize(
    ("file", "former", "present", "problem"),
    [
        ("pyproject.toml", "3.1.4", "3.1.5.dev0", "is no version that can be released"),
        ("CHANGELOG.md", "## [3.1.4] - 2031-04-01", "## [3.1.4]", "no date for 3.1.4"),
        ("CHANGELOG.md", "- A line.", "", "no entries for 3.1.4"),
        ("CHANGELOG.md", "## [Unreleased]\n", "## [Unreleased]\n\n- More.\n", "has entries under Unreleased"),
        ("docs/upgrade.md", "to 3.1", "to 3.0", "docs/upgrade.md tells nothing of 3.1"),
    ],
)
def test_what_is_missing_for_a_release_is_named(
    ready: Path, file: str, former: str, present: str, problem: str
) -> None:
    (ready / file).write_text((ready / file).read_text().replace(former, present))
    assert any(problem in each for each in find_problems(ready))


def test_a_release_needs_its_own_tag_and_saved_files(ready: Path) -> None:
    assert find_problems(ready, "v3.1.5") == ["the tag is v3.1.5, the version 3.1.4: expected v3.1.4"]
    shutil.rmtree(ready / "tests")
    assert find_problems(ready) == ["no saved files of 3.1.4: cd tests && python -m compatibility.make 3.1.4"]

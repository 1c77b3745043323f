"""The pages: their tables are those of the results, and their links lead somewhere."""

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

import collate
import samplers

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# As a script, it imports its neighbours.
sys.path.insert(0, str(ROOT / "benchmarks"))
PAGES = runpy.run_path(str(ROOT / "benchmarks" / "pages.py"))
sys.path.remove(str(ROOT / "benchmarks"))
PROSE = [*PAGES["pages"](), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
# Words that the rule of plain English replaces: again, mid-epoch, next to, largest, resume, checked against, that many.
FOREIGN = re.compile(r"\b(?:anew|amid|beside|greatest|whoever|so many|go(?:es)? on|held against)\b", re.IGNORECASE)
pages = pytest.mark.parametrize("page", PAGES["pages"](), ids=lambda page: page.name)


@pages
def test_the_tables_of_a_page_are_those_of_the_results(page: Path) -> None:
    assert PAGES["renewed"](page.read_text()) == page.read_text(), "run benchmarks/pages.py"


@pytest.mark.parametrize("name", PAGES["CHARTS"])
def test_a_picture_is_that_of_the_results(name: str) -> None:
    picture = (PAGES["PICTURES"] / f"{name}.svg").read_text(encoding="utf-8")
    assert picture == PAGES["drawn"](name), "run benchmarks/pages.py"
    assert ElementTree.fromstring(picture).tag.endswith("svg")


def test_targets_stand_in_benchmarks_and_in_no_page_of_the_site() -> None:
    named = {page: re.findall(r"<!-- table ([\w-]+-targets) -->", page.read_text()) for page in PAGES["pages"]()}
    results = ROOT / "benchmarks" / "results" / "README.md"
    assert sorted(named.pop(results)) == sorted(name for name in PAGES["TABLES"] if name.endswith("-targets"))
    assert [page.name for page, tables in named.items() if tables] == []


@pages
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    # Code has brackets before parentheses too.
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_a_page_uses_plain_words(page: Path) -> None:
    # Code and messages of the library are quoted as they are.
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    assert FOREIGN.findall(" ".join(prose.split())) == []


@pages
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    for path in re.findall(r"`((?:examples|benchmarks|tests|docs|collate|samplers)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation_of_the_site_once() -> None:
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("package", [collate, samplers])
def test_every_public_name_is_in_the_reference_once(package: ModuleType) -> None:
    pages = "".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    listed = re.findall(rf"^::: {package.__name__}\.(\w+)$", pages, re.MULTILINE)
    # An error that both packages export stands with those of the package that defines it.
    shared = {"LengthError"} if package is samplers else set()
    assert sorted(listed) == sorted(set(package.__all__) - shared)


def test_a_pipeline_that_the_page_of_shards_shows_stands_in_its_example() -> None:
    blocks = re.findall(r"```python\n(?!>>>)(.*?)```", (ROOT / "docs" / "shards.md").read_text(), re.DOTALL)
    [block] = [block for block in blocks if "DataPipeline" in block]
    example = (ROOT / "examples" / "stream_webdataset.py").read_text()
    assert {line.strip() for line in block.splitlines()} <= {line.strip() for line in example.splitlines()}

"""The pages: their tables are those of the results, and their links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = runpy.run_path(str(ROOT / "benchmarks" / "pages.py"))
pages = pytest.mark.parametrize("page", PAGES["pages"](), ids=lambda page: page.name)


@pages
def test_the_tables_of_a_page_are_those_of_the_results(page):
    assert PAGES["renewed"](page.read_text()) == page.read_text(), "run benchmarks/pages.py"


@pages
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pages
def test_the_files_that_a_page_names_exist(page):
    for path in re.findall(r"`((?:examples|benchmarks|tests|docs|collate|samplers)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / path).exists(), path

"""The site: what its hook adds, and the built pages as a browser gets them. A browser itself is not needed."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import collate
import samplers

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
# What the column of code holds in a window of 1280 pixels, with the widest of the usual fonts.
WIDEST = 100


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = spec_from_file_location("site_build", DOCS / "hooks" / "site_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if any(find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings", "mike")):
        pytest.skip("needs lengthtrack[docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def signatures(site: Path) -> Iterator[str]:
    """The signatures of the reference, as one reads them."""
    for page in sorted((site / "api").glob("*.html")):
        html = page.read_text(encoding="utf-8")
        for block in re.findall(r'<div class="[^"]*doc-signature.*?</pre>', html, re.DOTALL):
            yield unescape(re.sub(r"<[^>]+>", "", block))


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_examples_of_a_page_are_seen_whole(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.match(r" *(>>>|\.\.\.) ", line) and len(line) > WIDEST] == []


def test_the_list_for_programs_names_every_page_once(hook: ModuleType) -> None:
    text = hook.llms_text(CONFIG["site_name"], CONFIG["site_description"], CONFIG["nav"], DOCS)
    assert text.startswith(f"# {CONFIG['site_name']}\n\n> {CONFIG['site_description']}\n\n")
    entries = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): \S.*$", text, re.MULTILINE)
    pages = [page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(entry.rsplit(".", 1)[0] for entry in entries) == sorted(pages)
    assert all((DOCS / entry).exists() for entry in entries if entry.endswith(".md"))


def test_names_that_the_reference_leaves_out_exist() -> None:
    options = next(each["mkdocstrings"] for each in CONFIG["plugins"] if "mkdocstrings" in each)
    filters = options["handlers"]["python"]["options"]["filters"]
    names = [name for each in filters for group in re.findall(r"\^\((.*)\)\$", each) for name in group.split("|")]
    classes = (collate.LengthTrackedBatch, collate.VarlenBatch, samplers.LengthBucketBatchSampler)
    assert names
    assert [name for name in names if not any(hasattr(each, name) for each in classes)] == []


def test_a_built_site_has_what_its_list_names(site: Path) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"))
    assert len(targets) > 20
    assert [target for target in targets if not (site / target).is_file()] == []
    # The pages as Markdown link to each other.
    for page in site.glob("*.md"):
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        links = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name
    assert not (site / "hooks").exists()


def test_the_reference_shows_no_internals_and_links_its_types(site: Path) -> None:
    shown = list(signatures(site))
    assert len(shown) > 150
    assert [text for text in shown if re.search(r"(?<![\w.])_[A-Za-z]", text)] == []
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted((site / "api").glob("*.html")))
    # An option of `**options: Unpack[...]` has its default, and no second, empty description.
    assert any("window: int | None = None" in text for text in shown)
    assert not any("UNCHOSEN" in text or "CACHE_BYTES" in text for text in shown)
    assert not re.search(r'<div class="doc-md-description">\s*</div>', pages)
    assert not re.search(r'id="[\w.]+\.(from_rows|trusted\w*|record_stream|host_lengths)"', pages)
    for name in ("Lengths", "Widths", "Cost", "Count", "Overlong", "Shards", "PaddingValue", "IntegersLike"):
        assert re.search(rf'<a [^>]*href="types\.html#[\w.]+\.{name}"[^>]*>{name}</a>', pages), name


def test_examples_are_code_and_are_copied_without_prompts(site: Path) -> None:
    copied = 0
    for page in sorted(site.rglob("*.html")):
        html = page.read_text(encoding="utf-8")
        # A prompt outside of code would be a quotation in a quotation.
        assert "<blockquote>\n<blockquote>" not in html, page.name
        for block in re.findall(r'<div [^>]*class="language-(?:pycon|console) highlight"', html):
            [text] = re.findall(r'data-copy="([^"]*)"', block)
            assert text, page.name
            assert not re.search(r"^(>>>|\.\.\.|\$) ", unescape(text), re.MULTILINE), page.name
            copied += 1
    assert copied > 150

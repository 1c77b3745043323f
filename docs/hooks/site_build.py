"""What the site's build adds to MkDocs: examples that are copied without prompts, and `llms.txt` with its pages.

mkdocs.yml names this file as a hook. It imports nothing of MkDocs, so that tests can run without it.

`llms.txt` is a list of all pages for programs that read: https://llmstxt.org. Each page stands next to its HTML as the
Markdown it was made from. Pages of the reference are made from docstrings; of these the list names the HTML.
"""

import re
from html import escape, unescape
from pathlib import Path
from typing import Any, Final

# Sessions of Python are marked as such, which tells code from output; GitHub and doctest read the pages as they are.
SESSION: Final = re.compile(r"^( *)```python\n(?=\1>>> )", re.MULTILINE)
BLOCK: Final = re.compile(r'<div class="language-(?:pycon|console) highlight">.*?</pre></div>', re.DOTALL)
PROMPT: Final = re.compile(r"^(?:>>>|\$)(?: |$)")
CONTINUED: Final = re.compile(r"^\.\.\.(?: |$)")
GENERATED: Final = re.compile(r"(\]\((?:\.\./)*api/\w+)\.md")
REFERENCE: Final = "api/"


def on_page_markdown(markdown: str, **_: Any) -> str:
    r"""A page whose sessions of Python are marked as `pycon`.

    >>> on_page_markdown("```python\n>>> 1 + 1\n2\n\n```")
    '```pycon\n>>> 1 + 1\n2\n\n```'
    """
    return SESSION.sub(r"\1```pycon\n", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """A page whose copy buttons give what one types: no prompts and no output."""
    return BLOCK.sub(with_copy, html)


def with_copy(block: re.Match[str]) -> str:
    """A block of a session, with the attribute from which the theme's button copies."""
    text = unescape(re.sub(r"<[^>]+>", "", block[0]))
    return block[0].replace("<div ", f'<div data-copy="{escape(typed(text))}" ', 1)


def typed(session: str) -> str:
    r"""The lines of a session that one types, without their prompts.

    Dots are a prompt only after a line of Python that was typed; in output they are what they are:

    >>> typed(">>> for each in range(1):\n...     each\n0\n>>> print(text)\n...\n$ lengthtrack show\n... and 2 more")
    'for each in range(1):\n    each\nprint(text)\n\nlengthtrack show'
    >>> typed("$ lengthtrack index \\\n    shards\nshards: built")
    'lengthtrack index \\\n    shards'
    """
    lines: list[str] = []
    allowed: list[re.Pattern[str]] = [PROMPT]
    for line in session.splitlines():
        found = next((match for prompt in allowed if (match := prompt.match(line))), None)
        if found:
            lines.append(line[found.end() :])
            allowed = [PROMPT] if line.startswith("$") else [PROMPT, CONTINUED]
        elif allowed == [PROMPT] and lines and lines[-1].endswith("\\"):
            lines.append(line)
        else:
            allowed = [PROMPT]
    return "\n".join(lines)


def on_post_build(config: Any, **_: Any) -> None:
    """Write `llms.txt` and the Markdown of all pages into the site.

    Raises:
        FileNotFoundError: The list names a file that the site lacks.
    """
    docs, site = Path(config["docs_dir"]), Path(config["site_dir"])
    for _title, page in pages_of(config["nav"]):
        if not page.startswith(REFERENCE):
            text = GENERATED.sub(r"\1.html", (docs / page).read_text(encoding="utf-8"))
            (site / page).write_text(text, encoding="utf-8")
    listing = llms_text(config["site_name"], config["site_description"], config["nav"], docs)
    (site / "llms.txt").write_text(listing, encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", listing):
        if not (site / target).is_file():
            raise FileNotFoundError(f"llms.txt names {target}, which is not in {site}")


def llms_text(name: str, description: str, nav: list[Any], docs: Path) -> str:
    """The list of all pages: a title, a summary, and a section for each section of the navigation."""
    parts = [f"# {name}", f"> {description}", first_paragraph((docs / "index.md").read_text(encoding="utf-8"))]
    named = [(title, inside) for entry in nav for title, inside in entry.items()]
    loose = [{title: inside} for title, inside in named if isinstance(inside, str)]
    sections = [("Start", loose), *((title, inside) for title, inside in named if not isinstance(inside, str))]
    for title, entries in sections:
        links = [link(label, page, docs) for label, page in pages_of(entries)]
        parts.append("\n".join([f"## {title}", "", *links]))
    return "\n\n".join(parts) + "\n"


def link(label: str, page: str, docs: Path) -> str:
    """An entry of the list: the name of a page, its file in the site, and its contents."""
    target = page.removesuffix(".md") + ".html" if page.startswith(REFERENCE) else page
    return f"- [{label}]({target}): {contents(page, docs)}"


def contents(page: str, docs: Path) -> str:
    """What the table of pages in README.md says of a page; of a page that it lacks, the first sentence."""
    readme = (docs.parent / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| \[[^\]]+\]\(docs/{re.escape(page)}\) \| (.+) \|$", readme, re.MULTILINE)
    return row[1] if row else first_sentence((docs / page).read_text(encoding="utf-8"))


def first_sentence(page: str) -> str:
    r"""The first sentence of a page's prose.

    >>> first_sentence("# A page\n\nIt says [this](that.md), e.g. in\ntwo lines. More.")
    'It says this, e.g. in two lines.'
    """
    return re.split(r"(?<=[.:!?]) (?=[A-Z`])", first_paragraph(page), maxsplit=1)[0].rstrip(":")


def first_paragraph(page: str) -> str:
    """The first paragraph of a page's prose as one line, without links."""
    paragraphs = page.split("\n\n")
    prose = next((each for each in paragraphs if re.match(r"[A-Za-z`*]", each)), "")
    return re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", " ".join(prose.split()))


def pages_of(nav: list[Any]) -> list[tuple[str, str]]:
    """The names and files of all pages of a navigation."""
    found: list[tuple[str, str]] = []
    for title, inside in ((title, inside) for entry in nav for title, inside in entry.items()):
        found += [(title, inside)] if isinstance(inside, str) else pages_of(inside)
    return found

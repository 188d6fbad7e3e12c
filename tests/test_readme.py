"""README and documentation say what is true: snippets run, the generated table is current."""

import re

import pytest

from docs.tools import pictures, tables

PAGES = [tables.README, *sorted((tables.ROOT / "docs").glob("*.md"))]


def snippets(page):
    """Python blocks of a page, padded so that errors show the line numbers of the page."""
    text = page.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield "\n" * (text.count("\n", 0, match.start()) + 1) + match[1]


@pytest.mark.parametrize("page", [p for p in PAGES if any(snippets(p))], ids=lambda p: p.name)
def test_snippets_run(page, capsys):
    # Blocks of the README stand alone; those of a page continue one another.
    names: dict = {}
    for block in snippets(page):
        names = {} if page == tables.README else names
        exec(compile(block, str(page), "exec"), names)


def test_table_of_mechanisms_is_current():
    table = tables.between(tables.README.read_text(), "mechanisms")
    assert table == tables.mechanism_table(), "run `make readme`"


def test_local_links_exist():
    text = tables.README.read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (tables.ROOT / target).exists(), target


def test_picture_titles_are_the_expressions():
    for title, mask in pictures.catalogue().items():
        if "ids" not in title and "tiles" not in title:
            assert repr(mask) == title

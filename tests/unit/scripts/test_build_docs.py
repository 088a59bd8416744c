"""The pages of the documentation: every link has a target, and the site lists every page."""

import re
from pathlib import Path

import pytest

from scripts import build_docs

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(build_docs.files(build_docs.PAGES))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_have_targets(page):
    text = (ROOT / page).read_text()
    assert build_docs.dead_links(page, text) == []
    links = [match["target"] or "" for match in build_docs.CODE_OR_LINK.finditer(text)]
    for link in links:
        file, _, anchor = link.partition("#")
        if anchor and ":" not in link:
            assert anchor in anchors(build_docs.resolve(page, link) if file else page), link


def test_the_site_lists_every_page_once():
    listed = re.findall(r' = "(.*\.md)" \}', (ROOT / "zensical.toml").read_text())
    assert sorted(listed) == [page.as_posix() for page in PAGES]


def test_links_to_other_files_lead_to_the_repository_or_become_text():
    page = Path("docs/page.md")
    text = (
        "[a](../setup.py), [b](data.md#rows), `[c](d)`, [e](https://f.org), [g](#h), [i](gone.py)"
    )
    copied = {Path("docs/data.md")}
    assert build_docs.dead_links(page, text) == ["gone.py"]
    plain = text.replace("[a](../setup.py)", "a").replace("[i](gone.py)", "i")
    assert build_docs.replace_links(page, text, copied, None) == plain
    linked = build_docs.replace_links(page, text, copied, "https://r.org/x")
    assert "[a](https://r.org/x/tree/main/setup.py), [b](data.md#rows), `[c](d)`" in linked

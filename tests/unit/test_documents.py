"""The documents among themselves: links lead somewhere, decisions have their form, the changelog has its order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents import ROOT, codes, is_path, path_of, prose, read, sections

PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "BENCHMARKS.md", "REPORTS.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
DECISIONS = [page for page in PAGES if page.startswith("docs/adr/")]
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")  # Keep a Changelog's, in its order

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_DATED = re.compile(
    r"\b(?:January|February|March|April|May|June|July|August|September|October|November|December) 20\d\d\b"
)


def anchors(page: Path) -> set[str]:
    """What a link into the page may end in: its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for link in _LINK.findall(read(page)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page} links to {link}, which is not there"
        if anchor:
            assert anchor in anchors(target), f"{page} links to {link}, and there is no such heading"


@pytest.mark.parametrize("page", DECISIONS)
def test_a_decision_has_its_parts_and_names_files_that_are_there(page: str) -> None:
    text = read(page)
    number = int(Path(page).name[:4])
    assert re.match(rf"# {number}\. \w.*\n\nAccepted\.\n", text), f"{page} begins otherwise than its name"
    parts = list(sections(text, 2))
    assert parts[:2] == ["Context", "Decision"]
    assert {"Consequences", "Alternatives"} <= set(parts)
    absent = [name for name in codes(prose(text)) if is_path(name) and path_of(name) is None and "manifest" not in name]
    assert absent == [], f"{page} names files that are not there"


@pytest.mark.parametrize("page", DECISIONS)
def test_a_decision_that_quotes_what_was_measured_says_when_and_on_what(page: str) -> None:
    text = read(page)
    if re.search(r"\b(?:measured with|in the probes|medians? of|µs)", text, re.IGNORECASE):
        assert _DATED.search(text), f"{page} quotes figures and says no month"
        assert re.search(r"\bAMD|Intel|Arm\b", text), f"{page} quotes figures and names no processor"


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(Path(page).name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))


def test_a_version_s_changes_are_one_list_of_each_kind_without_repetitions() -> None:
    versions = sections(read("CHANGELOG.md"), 2)
    assert next(iter(versions)).endswith("Unreleased")
    for version, text in versions.items():
        kinds = re.findall(r"^### (.*)$", text, re.MULTILINE)
        assert kinds == [kind for kind in KINDS if kind in kinds], f"{version}: {kinds}"
        entries = [" ".join(entry.split()) for entry in re.split(r"^(?:- |### .*$)", text, flags=re.MULTILINE)]
        entries = [entry for entry in entries if entry]
        beginnings = [" ".join(entry.split()[:6]) for entry in entries]
        assert len(beginnings) == len(set(beginnings)), f"{version} says something twice"
        for name in kinds:
            body = text.partition(f"### {name}\n")[2].partition("\n###")[0].strip("\n")
            assert re.match(r"- ", body), f"{version}, {name} is no list"
            assert "\n\n" not in body, f"{version}, {name}: an empty line divides the list"

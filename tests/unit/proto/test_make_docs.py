"""docs/api.md says what the contract says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
_SPEC = importlib.util.spec_from_file_location("make_docs", ROOT / "proto" / "make_docs.py")
make_docs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(make_docs)


@pytest.fixture(scope="module")
def files():
    return make_docs.contract()


def test_the_document_is_what_the_contract_makes_it(files) -> None:
    text = make_docs.DOCUMENT.read_text("utf-8")
    assert text == make_docs.document(text, files), "docs/api.md is behind the contract: run `make format`"


def test_every_element_of_the_contract_stands_in_it(files) -> None:
    text = make_docs.reference(files)
    for file in files:
        for service in file.service:
            for method in service.method:
                assert f"\n#### {service.name}/{method.name}\n" in text
        for message in file.message_type:
            section = text.split(f"\n#### {message.name}\n")[1].split("\n### ")[0].split("\n#### ")[0]
            for field in message.field:
                assert f"| {field.number} | `{field.name}` |" in section
        for enum in file.enum_type:
            section = text.split(f"\n#### {enum.name}\n")[1].split("\n### ")[0].split("\n#### ")[0]
            for value in enum.value:
                assert f"| {value.number} | `{value.name}` |" in section


def test_every_link_leads_to_a_heading(files) -> None:
    text = make_docs.reference(files)
    headings = {heading.lower() for heading in re.findall(r"^#+ (\w+)$", text, re.M)}
    links = set(re.findall(r"\]\(#(\w+)\)", text))
    assert links
    assert links <= headings


def test_comments_are_shown_letter_by_letter_and_cells_stay_cells() -> None:
    assert make_docs._escaped("at <home> *.json in `<a>*`") == r"at \<home> \*.json in `<a>*`"
    assert make_docs._cell("a|b") == r"a\|b"


def test_errors_have_a_paragraph_of_their_own() -> None:
    assert make_docs._with_errors("Does. Errors: NOT_FOUND.") == "Does.\n\nErrors: NOT_FOUND."
    assert make_docs._with_errors("Does.") == "Does."


def test_a_document_without_the_mark_is_refused(files) -> None:
    with pytest.raises(SystemExit, match="is missing"):
        make_docs.document("# API\n", files)

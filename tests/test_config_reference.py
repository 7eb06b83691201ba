"""The reference of configuration keys is what the dataclasses say."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from sid_train.config import Config
from sid_train.config_reference import field_docs, main, reference, section_doc

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
SECTIONS = get_type_hints(Config)


@dataclass
class Documented:
    """A section.

    Its second paragraph.
    """

    first: int = 1
    """What the first one means,
    on two lines."""
    second: str = ""
    """What the second one means."""

    def method(self) -> None:
        """Documents no field."""


@dataclass
class Undocumented:
    """A section whose second field says nothing."""

    first: int = 1
    """What the first one means."""
    second: int = 2
    third: int = 3
    """What the third one means."""


@dataclass
class EmptyLast:
    """A section whose last field says nothing."""

    first: int = 1


class NoDocstring:
    first: int = 1
    """What the first one means."""


def test_the_page_is_what_the_command_writes(tmp_path):
    path = tmp_path / "configuration.md"
    assert main([str(path)]) == 0
    written = path.read_text(encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == written, (
        "docs/configuration.md is not what the dataclasses say: python -m sid_train.config_reference "
        "docs/configuration.md"
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_says_what_it_means(section):
    cls = SECTIONS[section]
    docs = field_docs(cls)
    assert list(docs) == [f.name for f in dataclasses.fields(cls)]
    assert [f"{section}.{name}" for name, text in docs.items() if len(text) < 15] == []
    assert len(section_doc(cls)) >= 8


def test_every_key_has_one_row_with_as_many_cells_as_the_heading():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    keys = [row.split("`")[1] for row in rows]
    assert keys == list(Config().flat())
    assert {row.replace(r"\|", "").count("|") for row in rows} == {5}


def test_field_docs_are_on_one_line_each():
    assert field_docs(Documented) == {
        "first": "What the first one means, on two lines.",
        "second": "What the second one means.",
    }
    assert section_doc(Documented) == "A section.\n\nIts second paragraph."


@pytest.mark.parametrize(("cls", "message"), [(Undocumented, "Undocumented.second"), (EmptyLast, "EmptyLast.first")])
def test_an_undocumented_field_is_named(cls, message):
    with pytest.raises(ValueError, match=message):
        field_docs(cls)


def test_an_undocumented_section_is_named():
    with pytest.raises(ValueError, match="NoDocstring: expected a docstring"):
        section_doc(NoDocstring)


def test_what_cannot_be_written_is_said_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere" / "page.md")]) == 2
    assert capsys.readouterr().err.startswith("error: ")

"""The nodes in other languages: every name and every help text of every node, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

LOCALES = Path(__file__).parents[2] / "locales"
LANGUAGES = sorted(folder.name for folder in LOCALES.iterdir())
# What stands in quotes in an English text is a value that a widget has: it has no translation.
QUOTED = re.compile(r"'([^']+)'")
# Inputs, outputs and nodes have other names in other languages.
IS_A_VALUE = {"auto", "from the file", "from the recipe", "none", "nag", "cfg", "cfg first step only", "lsg", "custom",
              "anti-cfg", "keep"}  # fmt: skip


def texts(node) -> dict[str, str]:
    """Of a node's schema, by their place in a file of translations."""
    schema = node.define_schema()
    found = {"display_name": schema.display_name, "description": schema.description}
    for declared in schema.inputs:
        found |= {f"inputs.{declared.id}.name": declared.id, f"inputs.{declared.id}.tooltip": declared.tooltip}
    for number, declared in enumerate(schema.outputs):
        name = declared.display_name or str(declared.get_io_type())
        found |= {f"outputs.{number}.name": name, f"outputs.{number}.tooltip": declared.tooltip}
    return found


def flat(content: dict, prefix: str = "") -> dict[str, str]:
    found = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_of_every_node_is_translated(nodes, language):
    translated = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(translated) == set(nodes)
    for name, node in nodes.items():
        ours, theirs = texts(node), flat(translated[name])
        assert set(ours) == set(theirs), name
        for place, english in ours.items():
            told = theirs[place]
            assert told.strip(), (name, place)
            if not place.endswith(".name"):
                assert any(ord(character) > 0x2E80 for character in told), (name, place)
            if place.endswith("tooltip") and place.startswith("inputs"):
                values = set(QUOTED.findall(english)) & IS_A_VALUE
                assert all(value in told for value in values), (name, place, values)
            assert told.count("\n") == english.count("\n"), (name, place)


def test_the_server_gives_them(server):
    served = server.get("/i18n")
    for language in LANGUAGES:
        assert served[language]["nodeDefs"]["SiDDistill"]["display_name"] != "SiD Distill"

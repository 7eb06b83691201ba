"""Writes docs/configuration.md, the reference of every configuration key, from the dataclasses that define the keys:

python -m sid_train.config_reference docs/configuration.md
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .config import Config

INTRODUCTION = """\
# Configuration reference

A configuration is a TOML file with the sections below. `--config` takes such a file, or the name of one that ships with
the trainer. `--set section.key=value` changes single values. A key that is left out has its default. A run prints its
whole configuration before it starts, and keeps it as `config.toml` in its folder.

The dataclasses in `sid_train` define the sections, and this page is generated from them. Edit the dataclasses, not this
page, and then write it again (a test compares the two):

```
python -m sid_train.config_reference docs/configuration.md
```
"""

TYPE_NAMES: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "true or false"}


def _class_definition(cls: type) -> ast.ClassDef:
    """The syntax tree of a class, from its source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    return definition


def field_docs(cls: type) -> dict[str, str]:
    """What the string literal that follows each field of a dataclass says, on one line, in the order of the fields.

    Python keeps these strings nowhere, so they are read from the source of ``cls``. ValueError for a field without one.
    """
    body = _class_definition(cls).body
    found: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        literal = following.value if isinstance(following, ast.Expr) else None
        if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
            found[statement.target.id] = " ".join(literal.value.split())
    names = [f.name for f in dataclasses.fields(cls)]
    missing = [name for name in names if not found.get(name)]
    if missing:
        raise ValueError(f"{cls.__name__}.{missing[0]}: expected a string that documents it on the next line, got none")
    return {name: found[name] for name in names}


def section_doc(cls: type) -> str:
    """The docstring of a section's class, its paragraphs kept; ValueError where there is none."""
    text = ast.get_docstring(_class_definition(cls))
    if not text:
        raise ValueError(f"{cls.__name__}: expected a docstring, got none")
    return text


def _markdown(text: str, in_table: bool = False) -> str:
    """A docstring as Markdown: double backticks become single ones, and no asterisk outside of them is emphasis."""
    parts = text.replace("``", "`").split("`")
    parts[::2] = [part.replace("*", r"\*") for part in parts[::2]]
    joined = "`".join(parts)
    return joined.replace("|", r"\|") if in_table else joined


def _type(kind: Any, where: str) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if kind not in TYPE_NAMES:
        raise ValueError(f"{where}: expected a Literal, int, float, str or bool, got {kind}")
    return TYPE_NAMES[kind]


def _section(name: str, cls: type) -> str:
    """The heading, the docstring and the table of one section."""
    hints, meanings, defaults = get_type_hints(cls), field_docs(cls), cls()
    lines = [
        f"## `{name}`",
        "",
        _markdown(section_doc(cls)),
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for key, meaning in meanings.items():
        default = json.dumps(getattr(defaults, key), ensure_ascii=False)
        kind = _type(hints[key], f"{name}.{key}")
        lines.append(f"| `{name}.{key}` | {kind} | `{default}` | {_markdown(meaning, in_table=True)} |")
    return "\n".join(lines) + "\n"


def reference() -> str:
    """The whole page: every section of ``Config`` in its order. ValueError for a section or field that says nothing."""
    classes = get_type_hints(Config)
    sections = [_section(f.name, classes[f.name]) for f in dataclasses.fields(Config)]
    return "\n".join([INTRODUCTION, *sections])


def main(argv: list[str] | None = None) -> int:
    """Writes the page to the file that is named. 0 is success, 2 an undocumented key or a path that is not writable."""
    parser = argparse.ArgumentParser(
        prog="python -m sid_train.config_reference",
        description="Writes the reference of every configuration key.",
    )
    parser.add_argument("file", type=Path, help="what to write: docs/configuration.md")
    args = parser.parse_args(argv)
    try:
        args.file.write_text(reference(), encoding="utf-8", newline="\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

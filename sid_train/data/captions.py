"""Which text of a record is its prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..files.reading import half_character, shown
from .entries import Dropped

TEXT_KEYS = ("prompt", "caption", "text")
"""Keys and columns that hold a prompt, in any case; the first one that is there counts."""
OTHER_KEYS = ("prompt_en", "caption_en", "text_en", "prompts", "captions", "texts", "txt", "tags")
"""What else data sets call it, where none of ``TEXT_KEYS`` is there."""
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Of members and files with a picture's caption; the first one that is there counts."""
CAPTION_LIMIT = 1 << 20
"""Bytes of one prompt or caption: more is another kind of file, and would occupy a tokenizer for minutes."""


def text_key(keys: Iterable[str], where: str) -> str:
    """The key or column that holds the prompts; ValueError that lists the ones that are there."""
    found = {str(key).strip().lower(): key for key in reversed(list(keys))}
    for key in (*TEXT_KEYS, *OTHER_KEYS):
        if key in found:
            return found[key]
    names = ", ".join(repr(key) for key in reversed(found.values()))
    raise ValueError(
        f"{where}: expected {', '.join(TEXT_KEYS[:-1])} or {TEXT_KEYS[-1]}, found {shown(names) or 'nothing'}: rename "
        f"the one that holds the prompts"
    )


def text_of(record: Mapping[str, Any], where: str, dropped: Dropped) -> str:
    """The prompt in a record: "" for null, the first of a list. ValueError names ``where`` and the keys that it has."""
    value = record[text_key(record, where)]
    if isinstance(value, list):
        if len(value) > 1:
            dropped.add("further caption(s) of a list", where, len(value) - 1)
        value = value[0] if value else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text, got {shown(repr(value), 60)}")
    return checked(value, where)


def checked(text: str, where: str) -> str:
    """``text``; ValueError where no tokenizer could read it."""
    if len(text) > CAPTION_LIMIT:
        raise ValueError(f"{where}: expected a prompt of at most {CAPTION_LIMIT:,} characters, got {len(text):,}")
    if (place := half_character(text)) >= 0:
        raise ValueError(
            f"{where}: expected text, but character {place + 1:,} is half of one ({shown(text[place])}), "
            f"as where text was cut at a fixed length: repair or remove it"
        )
    return text


def parse_caption(data: bytes, is_json: bool, where: str, dropped: Dropped) -> str:
    """The caption in the bytes of a text, or of a JSON object that has it under one of its usual names."""
    try:
        text = data.decode("utf-8-sig")
        record = json.loads(text) if is_json else {"text": text}
    except (ValueError, RecursionError):  # the former both of UTF-8 and of JSON
        raise ValueError(f"{where}: expected UTF-8 text, or a JSON object with the caption") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object with the caption, got {shown(repr(text[:60]))}")
    return checked(text_of(record, where, dropped).strip(), where)

"""What the nodes share: types, the category, and messages to the user."""

from __future__ import annotations

import dataclasses
import html
import logging
import re
import sys
from collections.abc import Iterable

import folder_paths
from comfy_api.latest import io

from ..sid_train.files.header import Header
from ..sid_train.files.header import read_header as read_any_header
from ..sid_train.files.reading import shown

CATEGORY = "SiD"
RecipeType = io.Custom("SID_RECIPE")
StrategyType = io.Custom("SID_STRATEGY")
# Of what is shown on a node: names and texts in it come from files and workflows of strangers.
MAX_LINES, MAX_LINE = 200, 1000

# Two slashes of either kind, Windows' \??\ and a scheme such as http:// or file:/ (one letter is a drive).
_OTHER_HOST = re.compile(r"[/\\]{2}|\\\?|[A-Za-z][A-Za-z0-9+.-]+:[/\\]")
_log = logging.getLogger("ComfyUI-SiD")
_warned: set[str] = set()  # the ids of the nodes that show a message
_SCHEMA_FIELDS = {f.name for f in dataclasses.fields(io.Schema)}


def schema(**fields) -> io.Schema:
    """An ``io.Schema`` in our category, without the fields that this version of ComfyUI does not know."""
    return io.Schema(**{k: v for k, v in (fields | {"category": CATEGORY}).items() if k in _SCHEMA_FIELDS})


def printable(text: str) -> str:
    """``text`` as lines that are printable and not too long, and not too many of them."""
    lines = text.split("\n", MAX_LINES)
    return "\n".join(shown(line, MAX_LINE) for line in lines[:MAX_LINES]) + "\n..." * (len(lines) > MAX_LINES)


def show(node: type[io.ComfyNode], text: str) -> None:
    """Shows ``text`` on the node."""
    web = sys.modules.get("server")  # absent when ComfyUI is used as a library
    server = getattr(web.PromptServer, "instance", None) if web else None
    if server is not None and node.hidden is not None and node.hidden.unique_id is not None:
        # The frontend takes it for HTML.
        server.send_progress_text(html.escape(printable(text), quote=False), node.hidden.unique_id)


def warn(node: type[io.ComfyNode], messages: Iterable[str]) -> None:
    """Shows what the user should know on the node, and logs it; where there is nothing any more, says that."""
    unique_id = node.hidden.unique_id if node.hidden is not None else None
    if text := "\n".join(shown(message, MAX_LINE) for message in messages):
        # ComfyUI runs clones of the classes, under names of their own.
        _log.warning("%s: %s", node.define_schema().node_id, text)
        show(node, text)
        _warned.add(unique_id)
    elif unique_id in _warned:
        show(node, "No warnings.")  # the frontend keeps the old text if it is sent nothing
        _warned.discard(unique_id)


def full_path(kind: str, name: str) -> str:
    """The path of a file that was chosen in one of ComfyUI's model folders; FileNotFoundError where there is none."""
    refuse_other_hosts(kind, name)
    return folder_paths.get_full_path_or_raise(kind, name)


def refuse_other_hosts(name: str, path: str) -> None:
    r"""ValueError for a path that another computer would be asked about: \\host\share, //host, http://host and so on.

    To be called before anything looks at the path: Windows sends the user's credentials to such hosts.
    """
    if _OTHER_HOST.match(path):
        raise ValueError(
            f"{name}: expected a path on this computer, got {shown(path, 200)!r}. A workflow may not make ComfyUI "
            "contact another host: copy the files, or mount the share under a path or a drive letter."
        )


def read_header(path: str, source: str) -> Header:
    """The header of a file; ValueError, which names ``source``, for one that is no safetensors file."""
    if not path.lower().endswith((".safetensors", ".sft")):
        raise ValueError(
            f"{source}: expected a safetensors file, since other formats can run code. Convert it first, which "
            "runs nothing of it: python -m sid_train convert FILE -o OUT.safetensors"
        )
    return read_any_header(path)

"""The readers of prompts and pictures, and small files of each kind for them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from common import CAPTIONS
from mutate import Input
from reader import Reader


def prompt_readers(work: Path) -> list[Reader]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sid_train.data.prompts import load_prompts

    records = "\n".join(json.dumps({"prompt": c, "n": 1}) for c in CAPTIONS)
    table = "prompt,n\n" + "\n".join(f'"{c}, ""big""",{n}' for n, c in enumerate(CAPTIONS))
    files = {"txt": "\n".join(CAPTIONS), "jsonl": records, "csv": table, "json": json.dumps(CAPTIONS)}
    made = [
        Reader(
            f"prompts.{kind}", [{f"given.{kind}": text.encode()}], f"given.{kind}", lambda p: load_prompts(str(p)), 2
        )
        for kind, text in files.items()
    ]
    columns = [
        pa.table({"text": CAPTIONS}), pa.table({"text": [1, 2]}), pa.table({"caption": [["a"], None]}),
        pa.table({"prompt": pa.array(["a b"] * 50).dictionary_encode()}), pa.table({"x": ["a"]}),
        pa.table({"text": pa.array([None, b"\xff"])}),
    ]  # fmt: skip
    seeds: list[Input] = []
    for column in columns:
        pq.write_table(column, work / "t.parquet")
        seeds.append({"given.parquet": (work / "t.parquet").read_bytes()})
    # A hundred kilobytes that are gigabytes when they are read whole.
    pq.write_table(pa.table({"text": pa.array(["A" * 100_000] * 20_000).dictionary_encode()}), work / "t.parquet")
    seeds.append({"given.parquet": (work / "t.parquet").read_bytes()})
    seeds = [*seeds[:-1] * 30, seeds[-1]]
    made.append(Reader("prompts.parquet", seeds, "given.parquet", lambda p: load_prompts(str(p)), 2))
    folder: Input = {f"{n}.txt": c.encode() for n, c in enumerate(CAPTIONS)} | {"deep/a.txt": b"a green eight"}
    made.append(Reader("prompts folder", [folder], "", lambda p: load_prompts(str(p)), 2))
    return made


def picture_readers(work: Path) -> list[Reader]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from sid_train.data.pictures import open_pictures

    def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
        buffer = io.BytesIO()
        Image.effect_noise((20, 24), 40).convert(mode).save(buffer, kind, **options)
        return buffer.getvalue()

    images = {
        "png": [encoded("PNG"), encoded("PNG", "RGBA"), encoded("PNG", "P"), encoded("PNG", "I;16")],
        "jpg": [encoded("JPEG"), encoded("JPEG", "CMYK"), encoded("JPEG", progressive=True)],
        "webp": [encoded("WEBP"), encoded("WEBP", lossless=True)],
    }
    alone = [
        Reader(f"pictures.{kind}", [{f"a.{kind}": data, "a.txt": b"a red three"} for data in several], "", _read_all, 2)
        for kind, several in images.items()
    ]
    png, jpg, webp = (several[0] for several in images.values())
    folder: Input = {"a.png": png, "a.txt": b"a", "b.jpg": jpg, "b.txt": b"b", "deep/c.webp": webp, "deep/c.txt": b"c"}
    records = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.jpg", "text": "b"}]
    listed: Input = {"a.png": png, "b.jpg": jpg, "metadata.jsonl": "\n".join(map(json.dumps, records)).encode()}
    tars: list[Input] = []
    for style in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=style) as tar:
            for name, data in {"a.png": png, "a.txt": b"a", "é/b.jpg": jpg, "é/b.json": b'{"caption": "b"}'}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        tars.append({"given.tar": buffer.getvalue()})
    braces: Input = {"given.txt": b"x{0..2}.tar"} | {f"x{n}.tar": tar["given.tar"] for n, tar in enumerate(tars)}
    tables: list[Input] = []
    for column in ([png, jpg], [{"bytes": png, "path": "a"}, {"bytes": jpg, "path": "b"}], ["a", "b"], [b"", None]):
        pq.write_table(pa.table({"image": column, "text": ["a", "b"]}), work / "t.parquet", row_group_size=1)
        tables.append({"given.parquet": (work / "t.parquet").read_bytes()})
    return [
        *alone,
        Reader("pictures folder", [folder], "", _read_all, 2),
        Reader("pictures metadata.jsonl", [listed], "", _read_all, 2),
        Reader("pictures.tar", tars, "given.tar", _read_all, 4),
        Reader("pictures.parquet", tables, "given.parquet", _read_all, 2),
        Reader("brace patterns", [braces], "given.txt", lambda p: open_pictures(_pattern(p)),
               0.3, ("data.pairs", "given-folder")),
    ]  # fmt: skip


def _pattern(path: Path) -> str:
    if not path.is_file():  # made a pipe or a folder, which says no pattern
        return str(path.parent / "x")
    with open(path, "rb") as file:
        return str(path.parent / file.read(3000).decode(errors="replace"))


def _read_all(path: Path) -> None:
    from sid_train.data.pictures import open_pictures

    pictures = open_pictures(str(path))
    for row in range(min(4, len(pictures))):
        pictures.read(row)

"""What users have: the layouts of kohya's, diffusers' and img2dataset's files, and that what is dropped is counted."""

import io
import json
import os
import socket
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from sid_train.data.pictures import expand_braces, open_pictures
from sid_train.data.prompts import load_prompts


def write(folder, files):
    """``files``: contents by path; text, bytes, or None for a picture that can be read."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PICTURE if content is None else content.encode() if isinstance(content, str) else content)
    return str(folder)


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = _picture()


def tar(members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            data = PICTURE if content is None else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def parquet(**columns) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


# -- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "source", "prompts"),
    [
        ({"p.txt": "a\u2028b\r\nc\x0bd\re\x0cf\n\x85g\n"}, "p.txt", ["a\u2028b", "c\x0bd", "e\x0cf", "g"]),
        ({"p.csv": 'caption\na\u2028b\r\n"c\nd"\n'}, "p.csv", ["a\u2028b", "c\nd"]),
        ({"p.csv": "ID,TEXT\n1,a\n"}, "p.csv", ["a"]),
        ({"P.JSONL": '{"Prompt": "a"}\n{"text_en": "b", "text_de": "c"}\n{"captions": ["d", "e"]}'}, "P.JSONL",
         ["a", "b", "d"]),
        ({"p.json": '["a", "b"]'}, "p.json", ["a", "b"]),
        ({"p.json": '[{"prompt": "a"}, {"text": "b"}]'}, "p.json", ["a", "b"]),
        ({"p.json": '{"prompts": ["a", "b"]}'}, "p.json", ["a", "b"]),
        ({"p.json": '{"id": "7", "prompt": "a"}'}, "p.json", ["a"]),
        ({"m.json": '{"x/1": {"caption": "a", "tags": "b, c"}, "2": {"tags": "d"}, "3": "e"}'}, "m.json",
         ["a, b, c", "d", "e"]),
        ({"p.parquet": parquet(id=[1, 2], TEXT=["a", "b"])}, "p.parquet", ["a", "b"]),
        ({"p.parquet": parquet(sentences=["x"], captions=[["a", "b"]])}, "p.parquet", ["a"]),
        ({"1.TXT": "a", "2.caption": "b", "3.jpg.txt": "c", "3.jpg": None}, "", ["a", "b", "c"]),
        ({"00000.tar": tar({"1.png": None, "1.txt": "a"}), "00000_stats.json": "{}"}, "", ["a"]),
        ({"0.parquet": parquet(caption=["a"]), "0.tar": b"not read", "0_stats.json": "{}"}, "", ["a"]),
        ({"metadata.csv": "file_name,text\n1.png,a\n", "1.png": None}, "", ["a"]),
    ],
)  # fmt: skip
def test_prompts_that_users_have(files, source, prompts, tmp_path):
    write(tmp_path, files)
    assert load_prompts(str(tmp_path / source)) == prompts


@pytest.mark.parametrize(
    ("files", "source", "told"),
    [
        ({"p.csv": "caption\na cat, red\nb\na, b, c\n"}, "p.csv", "3 field(s) beyond the header's: put quotes"),
        ({"p.csv": "caption\na cat, red\n"}, "p.csv", "p.csv, line 2"),
        ({"p.jsonl": '{"text": ["a", "b", "c"]}'}, "p.jsonl", "2 further caption(s) of a list (first: data.prompts: "),
        ({"a.txt": "a", "README.txt": "b", "License.txt": "c"}, "", "2 other file(s) (first: "),
        ({"a.txt": "a", ".ipynb_checkpoints/a.txt": "b", "._a.txt": "c"}, "", "2 hidden file(s) or folder(s)"),
        ({"a.txt": "a", "__MACOSX/a.txt": "b"}, "", "1 hidden file(s) or folder(s)"),
    ],
)  # fmt: skip
def test_what_prompts_drop_is_told(files, source, told, tmp_path, capsys):
    write(tmp_path, files)
    assert "b" not in (prompts := load_prompts(str(tmp_path / source), report=True)) or source == "p.csv"
    assert prompts[0] in ("a", "a cat")
    summary, dropped = capsys.readouterr().out.splitlines()
    assert "prompts (0 duplicates and 0 empty ones dropped)" in summary
    assert "not used: " in dropped
    assert told in dropped


# -- pairs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "source", "captions"),
    [
        ({"1.PNG": None, "1.TXT": "a", "2.jfif": None, "2.caption": "b", "3.png": None, "3.png.txt": "c"}, "",
         ["a", "b", "c"]),
        ({"a.b.png": None, "a.b.txt": "a", "c.png": None, "c.txt": "b", "c.json": "{}"}, "", ["a", "b"]),
        ({"0/1.png": None, "0/1.txt": "a", "0/1.json": '{"caption": "x"}', "0.parquet": b"", "0_stats.json": "{}"}, "",
         ["a"]),
        ({"0/1.png": None, "0/1.json": '{"caption": "a"}', "0.parquet": b""}, "", ["a"]),
        ({"metadata.csv": "file_name,text\n1.png,a\n", "1.png": None}, "", ["a"]),
        ({"train/metadata.csv": "file_name,TEXT\n1.png,a\n", "train/1.png": None}, "", ["a"]),
        ({"metadata.jsonl": '{"file_name": "1.png", "text": ["a", "b"]}', "1.png": None}, "metadata.jsonl", ["a"]),
        ({"meta.json": '{"x/1": {"caption": "a", "tags": "t"}, "2.png": "b"}', "x/1.png": None, "2.png": None},
         "meta.json", ["a, t", "b"]),
        ({"0.TAR": tar({"1.PNG": None, "1.TXT": "a"})}, "", ["a"]),
        ({"0.tar": tar({"1.png": None, "1.txt": "a"}), "0.parquet": b"", "0_stats.json": "{}"}, "", ["a"]),
        ({"0.tar": tar({"a.b.png": None, "a.b.txt": "a", "a.c.png": None, "a.c.txt": "b"})}, "", ["a", "b"]),
        ({"0.tar": tar({"1.png": None, "1.json": '{"width": 8}', "1.txt": "a"})}, "", ["a"]),
        ({"0.tar": tar({"1.txt": "a", "1.json": '{"caption": "x"}', "1.png": None})}, "", ["a"]),
        ({"0.tar": tar({"1.png": None, "1.png.txt": "a", "2.png": None, "2.caption": "b"})}, "", ["a", "b"]),
        ({"0.tar": tar({"1.png": None, "1.mask.png": None, "1.txt": "a", "._1.png": "x"})}, "", ["a"]),
        ({"0.parquet": parquet(key=["0"], JPG=[PICTURE], txt=["a"])}, "", ["a"]),
    ],
)  # fmt: skip
def test_pairs_that_users_have(files, source, captions, tmp_path):
    pictures = open_pictures(str(tmp_path / source) if write(tmp_path, files) and source else str(tmp_path))
    assert [entry.caption for entry in pictures.entries] == captions
    assert [pictures.read(row).size for row in range(len(pictures))] == [(8, 8)] * len(captions)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"2.jxl": "x", "3.HEIC": "x"}, "2 picture(s) of formats that are not read"),
        ({"README.txt": "x", "2.caption": "x"}, "2 caption file(s) without a picture"),
        ({"1.npz": "x"}, "1 other file(s)"),
        ({".ipynb_checkpoints/1.png": None}, "1 hidden file(s) or folder(s)"),
        ({"metadata.csv": "file_name,text\n1.png,a\n", "2.png": None}, "1 picture(s) that no list names"),
    ],
)
def test_what_pairs_drop_is_told(files, told, tmp_path, capsys):
    source = write(tmp_path, {"1.png": None, "1.txt": "a"} | files)
    assert len(open_pictures(source, report=True)) == 1
    summary, dropped = capsys.readouterr().out.splitlines()
    assert summary == f"{source}: 1 pairs"
    assert f"not used: {told} (first: {tmp_path}" in dropped


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"1.mask.png": None, "1.cls": "7"}, "2 other file(s) in archives"),
        ({"2.jxl": "x", "2.txt": "b"}, "1 picture(s) of formats that are not read"),
        ({"__MACOSX/1.png": "x", "._1.txt": "x"}, "2 hidden file(s) or folder(s)"),
    ],
)
def test_what_archives_drop_is_told(members, told, tmp_path, capsys):
    write(tmp_path, {"0.tar": tar({"1.png": None, "1.txt": "a"} | members)})
    assert len(open_pictures(str(tmp_path / "0.tar"), report=True)) == 1
    assert told in capsys.readouterr().out


def test_links_are_followed_and_each_folder_is_read_once(tmp_path, capsys):
    write(tmp_path / "elsewhere", {"2.png": None, "2.txt": "b"})
    source = write(tmp_path / "data", {"1.png": None, "1.txt": "a", "deep/3.png": None, "deep/3.txt": "c"})
    for name, target in [("a-link", "../elsewhere"), ("again", "../elsewhere"), ("loop", "."), ("a-deep", "deep")]:
        (tmp_path / "data" / name).symlink_to(target)
    (tmp_path / "data" / "lost.txt").symlink_to("nowhere")
    (tmp_path / "data" / "circle.txt").symlink_to("circle.txt")
    pictures = open_pictures(source, report=True)
    assert [entry.caption for entry in pictures.entries] == ["a", "b", "c"]
    assert pictures.entries[2].file == tmp_path / "data" / "deep" / "3.png"  # its own path, not the link's
    assert sorted(load_prompts(source)) == ["a", "b", "c"]
    told = capsys.readouterr().out
    assert "3 link(s) to a folder that is read already" in told
    assert "2 link(s) that lead nowhere" in told


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in this system's folders")
def test_only_regular_files_are_read(tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "data", {"1.png": None, "1.txt": "a"})
    os.mkfifo(tmp_path / "data" / "2.txt")
    (tmp_path / "data" / "3.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path / "data")  # a socket's path must be short
        listening.bind("4.txt")
        assert load_prompts(source, report=True) == ["a"]
        assert len(open_pictures(source)) == 1
    assert "3 pipe(s), socket(s) or device(s)" in capsys.readouterr().out
    (tmp_path / "data" / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no \.txt file \(3 pipe"):
        load_prompts(source)


# -- bounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../1.png", "/etc/hostname", "x/../../1.png"])
def test_names_in_lists_stay_in_their_folder(name, tmp_path):
    source = write(tmp_path / "data", {"2.png": None, "metadata.jsonl": json.dumps({"file_name": name, "text": "a"})})
    write(tmp_path, {"1.png": None})
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: expected the name of a file in .*data"):
        open_pictures(source)


def test_an_absolute_name_of_a_file_in_the_folder_is_one(tmp_path):
    write(tmp_path, {"1.png": None, "meta.json": json.dumps({str(tmp_path / "1.png"): {"caption": "a"}})})
    assert len(open_pictures(str(tmp_path / "meta.json"))) == 1


@pytest.mark.parametrize(
    "pattern", ["x{0..99999999999}.tar", "{0..100000}.tar", "{0..999}{0..999}", "{" + "0" * 9 + ".." + "9" * 5000 + "}"]
)
def test_a_pattern_for_too_many_files_is_refused_at_once(pattern):
    with pytest.raises(ValueError, match=r"stands for more than 100,000 files|at most 9 digits"):
        expand_braces(pattern)


def test_a_long_pattern_cannot_fill_the_memory():
    with pytest.raises(ValueError, match="stands for names of more than 33,554,432 characters"):
        expand_braces("x" * 4000 + "{00000..99999}.tar")


def test_nothing_is_not_the_current_folder():
    with pytest.raises(ValueError, match="expected a folder of pictures with captions"):
        open_pictures(" ")


def test_an_archive_cannot_claim_more_than_it_holds(tmp_path):
    whole = tar({"1.png": None, "1.txt": "a" * 600})
    sparse = bytearray(tar({"1.png": None, "1.txt": "a"}))
    header = sparse.index(b"1.txt")
    block = sparse[header : header + 512]
    block[156:157] = b"S"  # GNU's sparse file: one piece of no bytes, 3 GiB in all
    for start, value in ((386, 3 << 30), (398, 0), (483, 3 << 30)):
        block[start : start + 12] = b"\x80" + value.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    sparse[header : header + 512] = block
    second = whole.index(b"1.txt")
    for name, data, message in [
        ("sparse", bytes(sparse), r"sparse\.tar/1\.txt: expected 3,221,225,472 bytes that stand in the archive"),
        ("cut", whole[: second + 700], r"cut\.tar"),
        ("damaged", whole[:second] + b"\xff" + whole[second + 1 :], r"damaged\.tar: .*header at byte 1,024 is damaged"),
    ]:
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            open_pictures(str(tmp_path / f"{name}.tar"))


def test_a_table_cannot_claim_more_than_texts_need(tmp_path):
    """1.1 MB, twenty times: stored once, they take less than a kilobyte on the disk."""
    table = pyarrow.table({"text": ["x" * 1_100_000] * 20})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"p\.parquet: .*texts of at most 1,048,576 bytes, got one of 1,100,000"):
        load_prompts(str(tmp_path / "p.parquet"))

"""Files and folders that are whole or not there."""

import os
import subprocess
import sys

import pytest

from sid_train.files import atomic
from sid_train.files.atomic import remove_leftovers, replacing, replacing_folder, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a", "old")

    def write():
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks Linux which file is written")
def test_the_data_is_on_the_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    """The order that survives a power cut: fsync of the file, rename, fsync of the folder."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    write_text(tmp_path / "a", "new")
    assert done[0].startswith(".a.")
    assert done[1:] == ["replace", tmp_path.name]


def test_a_folder_takes_the_place_of_an_older_one(tmp_path):
    for text in ("first", "second"):
        with replacing_folder(tmp_path / "f") as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / "a").write_text(text)
    assert (tmp_path / "f" / "deep" / "a").read_text() == "second"
    assert names(tmp_path) == ["f"]
    with pytest.raises(ValueError, match="stop"), replacing_folder(tmp_path / "f") as temporary:
        raise ValueError("stop")
    assert names(tmp_path) == ["f"]


def killed_while_writing(path):
    code = (
        "import os, sys; from pathlib import Path; from sid_train.files.atomic import replacing\n"
        "with replacing(Path(sys.argv[1])) as t: t.write_text('half'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=os.getcwd())


@pytest.mark.skipif(sys.platform == "win32", reason="asks whether a process is alive")
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    path = tmp_path / "a [1].txt"
    killed_while_writing(path)
    killed_while_writing(tmp_path / "other")
    assert len(names(tmp_path)) == 2
    write_text(path, "whole")
    left = names(tmp_path)
    assert len(left) == 2  # the other file's stays: who removes it is its own writer
    assert "a [1].txt" in left
    assert left[0].startswith(".other.")


def test_whoever_holds_the_lock_removes_all_leftovers_and_nothing_else(tmp_path):
    killed_while_writing(tmp_path / "a")
    for mine in (".notes.tmp", "a.tmp", ".a.b.tmp"):
        (tmp_path / mine).write_text("")
    (tmp_path / ".old.otherhost.12.0123abcd.tmp").mkdir()
    (tmp_path / ".checkpoint.safetensors.123.tmp").write_text("as earlier versions named them")
    (tmp_path / ".0000004.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".a.b.tmp", ".notes.tmp", "a.tmp"]


def test_two_writers_with_one_process_number_do_not_share_a_name(tmp_path):
    """As in two containers on one volume."""
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1"


def test_windows_may_hold_a_file_for_a_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.sys, "platform", "win32")
    tries = []

    def busy():
        tries.append(1)
        if len(tries) < 3:
            raise PermissionError("in use")

    atomic._patiently(busy)
    assert len(tries) == 3

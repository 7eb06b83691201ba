"""Logs that something else wrote into."""

from sid_train.files.logs import append_log, read_log, rewind_log


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    log = tmp_path / "log.jsonl"
    append_log(log, {"iteration": 1, "loss": 0.5})
    with open(log, "ab") as file:
        file.write(
            b'3\n[]\n"x"\n{"iteration": "2"}\n' + b"[" * 100_000 + b"\n\xff\xfe\x00\x00\n" + bytes(50) + b'\n{"iter\n'
        )
    append_log(log, {"iteration": 2, "loss": 0.25})
    append_log(log, {"iteration": 3, "loss": 0.25})
    assert [entry["iteration"] for entry in read_log(log)] == [1, 2, 3]
    assert rewind_log(log, 2) == 8
    assert log.read_text() == '{"iteration": 1, "loss": 0.5}\n{"iteration": 2, "loss": 0.25}\n'
    assert read_log(tmp_path / "none") == []

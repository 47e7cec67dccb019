"""A file that is written is the old one or the new one, and nothing is left beside it."""

import pytest

from triglot.files import replacing, sync, write_text


def test_text_is_written_as_utf_8_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first\n", "žluťoučký\r\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half of the n", encoding="utf-8")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_written_over(tmp_path):
    path = tmp_path / "a.txt"
    (tmp_path / ".a.txt.writing").write_text("left behind, and longer than what follows", encoding="utf-8")
    write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_files_and_folders_can_be_synced_and_nothing_else(tmp_path):
    (tmp_path / "a.txt").touch()
    sync(tmp_path / "a.txt")
    sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "b.txt")

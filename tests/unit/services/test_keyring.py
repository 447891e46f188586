"""What a file of keys may be, and that no key is in what is said of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from gms_launch.errors import UsageError
from gms_launch.services import keyring

ONE, TWO = "first-key-0123456789", "c2Vjb25kIGtleSBpcyBoZXJl/+=="


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest().upper()


def file_of(directory: Path, text: str, mode: int = 0o600) -> Path:
    path = directory / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_key_a_line_with_comments(tmp_path: Path) -> None:
    path = file_of(tmp_path, f"# who\n\n{ONE}   # alice\n  {TWO}\r\n{ONE}\n")
    assert keyring.read(path) == (digest(ONE), digest(TWO)), "each once, in their order"


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o602, 0o660])
def test_a_file_that_others_can_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(UsageError, match=f"has mode 0{mode:o}, so others can read or change it: chmod 600"):
        keyring.read(file_of(tmp_path, ONE, mode))


@pytest.mark.skipif(os.getuid() != 0, reason="files of another user take root")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, ONE)
    os.chown(path, 12345, 12345)
    with pytest.raises(UsageError, match="belongs to user 12345, who could change it"):
        keyring.read(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no key in it"),
        ("# nothing\n", "has no key in it"),
        (f"{ONE}\nshort\n", "line 2: the key has 5 characters"),
        (f"{ONE}\n{'x' * 2000}\n", "line 2: the key has 2000 characters"),
        ("two words-0123456789\n", "line 1: a key is one word"),
        ("schlüssel-0123456789\n", "line 1: a key is one word"),
        ('quoted"-0123456789\n', "line 1: a key is one word"),
        ("x" * (keyring.MOST + 1), "that is no file of keys"),
    ],
)
def test_what_is_no_file_of_keys_is_told_without_the_keys(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        keyring.read(file_of(tmp_path, text))
    assert said in str(refused.value)
    assert "0123456789" not in str(refused.value)


def test_what_is_not_there_and_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        keyring.read(tmp_path / "none")
    with pytest.raises(UsageError, match="is no ordinary file"):
        keyring.read(tmp_path)
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(UsageError, match="is no ordinary file"):
        keyring.read(tmp_path / "fifo")

"""A certificate that would not do is refused before anything listens with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from gms_launch.errors import UsageError
from gms_launch.services import certificate
from tests import certificates


def test_a_good_pair_is_one_text(tmp_path: Path) -> None:
    cert, key = certificates.make(tmp_path)
    text = certificate.check(str(cert), str(key))
    assert text == cert.read_text() + key.read_text()


def refusal(cert: Path, key: Path) -> str:
    with pytest.raises(UsageError) as refused:
        certificate.check(str(cert), str(key))
    return str(refused.value)


def test_what_will_not_do(tmp_path: Path) -> None:
    cert, key = certificates.make(tmp_path / "good")
    old, old_key = certificates.make(tmp_path / "old", days=(-9, -1))
    early, early_key = certificates.make(tmp_path / "early", days=(1, 9))
    assert f"--tls-cert {old} has run out: CN=models.example.org was good until" in refusal(old, old_key)
    assert f"--tls-cert {early} is not valid yet" in refusal(early, early_key)
    assert refusal(cert, old_key) == f"--tls-cert {cert} and --tls-key {old_key} belong to different pairs"
    assert "has no certificate in PEM form" in refusal(key, key)
    assert "cannot be used" in refusal(cert, cert)
    assert f"--tls-cert {tmp_path}/none cannot be read: No such file" in refusal(tmp_path / "none", key)
    assert f"--tls-key {tmp_path} cannot be read: Is a directory" in refusal(cert, tmp_path)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    assert "has no certificate in PEM form" in refusal(tmp_path / "binary", key)
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        )
    )
    assert f"--tls-key {locked} has a passphrase" in refusal(cert, locked)

"""Certificates and keys of the user's own, looked at before anything speaks with them."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

from gms_launch.errors import UsageError
from gms_launch.services.base import shown

#: Of an authority's file (bytes): Dynamo's processes get it as one variable, and Linux has room for 128 KiB in one.
LARGEST = 100_000


def check(cert: str, key: str) -> str:
    """Both as one text, as the proxy wants them. Raises `UsageError` as `pair` does."""
    return "".join(text.rstrip() + "\n" for text in pair(cert, key, "--tls-cert", "--tls-key"))


def authority(path: str, flag: str) -> str:
    """What is in the file of `flag`. Raises `UsageError` when it cannot be read, or is no certificate of now."""
    text = _read(path, flag)
    if len(text) > LARGEST:
        raise UsageError(
            f"{flag} {shown(path)} has {len(text) >> 10} KiB of certificates, and engines get them by their "
            f"environment, which has no room for more than {LARGEST >> 10}: give the one that the server's follows from"
        )
    _valid_now(path, text, flag)
    return text


def _read(path: str, flag: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError as exc:
        raise UsageError(f"{flag} {shown(path)} cannot be read: {exc.strerror}") from None


def pair(cert: str, key: str, cert_flag: str, key_flag: str) -> tuple[str, str]:
    """What is in the files.

    Raises `UsageError` when one cannot be read, has run out or is not valid yet, or when they do not belong together.
    """
    texts = _read(cert, cert_flag), _read(key, key_flag)
    _valid_now(cert, texts[0], cert_flag)
    try:
        # A passphrase would be asked for on a terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_no_passphrase)
    except _PassphraseError:
        raise UsageError(
            f"{key_flag} {shown(key)} has a passphrase, and nobody is there to type it: give one without"
        ) from None
    except (ssl.SSLError, OSError) as exc:
        reason = getattr(exc, "reason", None) or exc
        what = "belong to different pairs" if "MISMATCH" in str(reason) else f"cannot be used ({reason})"
        raise UsageError(f"{cert_flag} {shown(cert)} and {key_flag} {shown(key)} {what}") from None
    return texts


def _valid_now(path: str, text: str, flag: str) -> None:
    from cryptography import x509

    try:
        chain = x509.load_pem_x509_certificates(text.encode())
    except ValueError:
        raise UsageError(f"{flag} {shown(path)} has no certificate in PEM form") from None
    now = datetime.datetime.now(datetime.timezone.utc)
    for found in chain:
        begin, end = _utc(found, "not_valid_before"), _utc(found, "not_valid_after")
        if now > end:
            raise UsageError(f"{flag} {shown(path)} has run out: {found.subject.rfc4514_string()} was good until {end}")
        if now < begin:
            raise UsageError(
                f"{flag} {shown(path)} is not valid yet: {found.subject.rfc4514_string()} begins at {begin}"
            )


def _utc(certificate: object, name: str) -> datetime.datetime:
    """A moment of a certificate; cryptography before 42 gives it without its zone."""
    found = getattr(certificate, f"{name}_utc", None) or getattr(certificate, name).replace(
        tzinfo=datetime.timezone.utc
    )
    assert isinstance(found, datetime.datetime)
    return found


class _PassphraseError(Exception):
    pass


def _no_passphrase() -> str:
    raise _PassphraseError

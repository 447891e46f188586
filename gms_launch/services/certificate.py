"""A certificate and its key, looked at before anything listens with them."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

from gms_launch.errors import UsageError
from gms_launch.services.base import shown


def check(cert: str, key: str) -> str:
    """Both as one text, as the proxy wants them.

    Raises `UsageError` when one cannot be read, has run out or is not valid yet, or when they do not belong together.
    """
    texts = {}
    for flag, path in (("--tls-cert", cert), ("--tls-key", key)):
        try:
            texts[flag] = Path(path).read_text(encoding="ascii", errors="replace")
        except OSError as exc:
            raise UsageError(f"{flag} {shown(path)} cannot be read: {exc.strerror}") from None
    _valid_now(cert, texts["--tls-cert"])
    try:
        # A passphrase would be asked for on a terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_no_passphrase)
    except _PassphraseError:
        raise UsageError(
            f"--tls-key {shown(key)} has a passphrase, and nobody is there to type it: give one without"
        ) from None
    except (ssl.SSLError, OSError) as exc:
        reason = getattr(exc, "reason", None) or exc
        what = "belong to different pairs" if "MISMATCH" in str(reason) else f"cannot be used ({reason})"
        raise UsageError(f"--tls-cert {shown(cert)} and --tls-key {shown(key)} {what}") from None
    return texts["--tls-cert"].rstrip() + "\n" + texts["--tls-key"].rstrip() + "\n"


def _valid_now(path: str, text: str) -> None:
    from cryptography import x509

    try:
        chain = x509.load_pem_x509_certificates(text.encode())
    except ValueError:
        raise UsageError(f"--tls-cert {shown(path)} has no certificate in PEM form") from None
    now = datetime.datetime.now(datetime.timezone.utc)
    for found in chain:
        begin, end = _utc(found, "not_valid_before"), _utc(found, "not_valid_after")
        if now > end:
            raise UsageError(
                f"--tls-cert {shown(path)} has run out: {found.subject.rfc4514_string()} was good until {end}"
            )
        if now < begin:
            raise UsageError(
                f"--tls-cert {shown(path)} is not valid yet: {found.subject.rfc4514_string()} begins at {begin}"
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

"""Servers of the user's own that a run uses in place of its own: an etcd, a NATS, and what is shown to them."""

from __future__ import annotations

import os
import ssl
from urllib.parse import urlsplit

from gms_launch.control import tls
from gms_launch.control.access import Access
from gms_launch.engines import dynamo, installed
from gms_launch.engines.base import Nats
from gms_launch.errors import UsageError
from gms_launch.run.credentials import Pem
from gms_launch.services import certificate
from gms_launch.services import nats as service
from gms_launch.settings.declared import Settings
from gms_launch.urls import split_login

#: How long an etcd may take to show its certificate (seconds).
PATIENCE = 5.0


def endpoints(settings: Settings) -> tuple[str, ...]:
    """The user's etcd; empty when the run starts its own."""
    return tuple(e.strip() for e in settings.etcd_endpoints.split(",") if e.strip())


def secure(settings: Settings) -> bool:
    """True for an etcd of the user's own that speaks TLS."""
    return any(url.startswith("https://") for url in endpoints(settings))


def given(settings: Settings) -> Pem:
    """What is in the files for etcd. Raises `UsageError`."""
    ca = certificate.authority(settings.etcd_ca, "--etcd-ca") if settings.etcd_ca else ""
    shown = ("", "")
    if settings.etcd_cert:
        shown = certificate.pair(settings.etcd_cert, settings.etcd_key, "--etcd-cert", "--etcd-key")
    return Pem(ca, *shown)


def pem(settings: Settings) -> Pem | None:
    """What all of the run show to the user's etcd, and whom they trust; None when the run starts its own.

    Without --etcd-ca the etcd is asked now which of the system's authorities it answers to. Raises `UsageError` and
    `NoContactError`.
    """
    if not settings.etcd_endpoints:
        return None
    found = given(settings)
    if secure(settings) and not found.ca:
        access = Access(endpoints(settings), "", found.cert, found.key)
        found = Pem(tls.system_roots(access, PATIENCE), found.cert, found.key)
    return found


def placeholder(settings: Settings, word: str) -> Pem | None:
    """The same for a plan: `word` stands for what would be there."""
    if not settings.etcd_endpoints:
        return None
    shown = word if settings.etcd_cert else ""
    return Pem(word if secure(settings) else "", shown, shown)


def nats(settings: Settings) -> Nats:
    """The user's NATS; none when there is none."""
    files = {"CA_CERT": settings.nats_ca, "CLIENT_CERT": settings.nats_cert, "CLIENT_KEY": settings.nats_key}
    return Nats.of(settings.nats_server, {k: os.path.abspath(v) for k, v in files.items() if v})


def ask_nats(settings: Settings) -> str:
    """Log in to the user's NATS; what came of it, for people. Raises `NotReadyError`."""
    found = split_login(settings.nats_server)
    parts, context = urlsplit(found.url), None
    if parts.scheme == "tls":
        context = ssl.create_default_context(cafile=settings.nats_ca or None)
        if settings.nats_cert:
            context.load_cert_chain(settings.nats_cert, settings.nats_key)
    login = {"user": found.user, "pass": found.password, "auth_token": found.token}
    address = parts.hostname or ""
    service.ask(address, parts.port or 4222, {k: v for k, v in login.items() if v}, context, PATIENCE)
    return f"{found.url} answers" + (" and knows the login" if any(login.values()) else "")


def check(settings: Settings) -> None:
    """Raise `UsageError` for what would keep the leader's processes from these servers, as far as files tell."""
    given(settings)
    if settings.nats_ca:
        certificate.authority(settings.nats_ca, "--nats-ca")
    if settings.nats_cert:
        certificate.pair(settings.nats_cert, settings.nats_key, "--nats-cert", "--nats-key")
    version = installed.look(settings.python, (), ("ai-dynamo",)).versions.get("ai-dynamo", "")
    if settings.nats_server.startswith("tls://") and not dynamo.speaks_tls_to_nats(version):
        raise UsageError(
            f"--nats-server tls://...: Dynamo {version}, which is installed, speaks no TLS to NATS; 1.5 is the first "
            "that does. Install that, leave NATS out (--no-nats), or let the run start its own on its loopback"
        )

"""TLS with nothing but the standard library: is this server of our run, and whom does it answer to? `client` has grpc's
own."""

from __future__ import annotations

import os
import socket
import ssl
from typing import Any

from gms_launch.control.access import Access, split_endpoint
from gms_launch.errors import NoContactError


def context(access: Access) -> ssl.SSLContext:
    """Trusts `access.ca` alone, and shows our certificate if there is one. Raises `ValueError` for what is no PEM."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        made.load_verify_locations(cadata=access.ca)
    except ssl.SSLError as exc:
        raise ValueError(f"not a certificate in PEM: {exc}") from None
    return _shown(made, access)


def _shown(made: ssl.SSLContext, access: Access) -> ssl.SSLContext:
    try:
        if access.cert:
            # OpenSSL's call takes the name of a file; this one is in memory, and nobody's but ours.
            fd = os.memfd_create("certificate")
            try:
                os.write(fd, (access.cert + access.key).encode())
                made.load_cert_chain(f"/proc/self/fd/{fd}")
            finally:
                os.close(fd)
    except ssl.SSLError as exc:
        raise ValueError(f"not a certificate and its key in PEM: {exc}") from None
    return made


def system_roots(access: Access, timeout: float) -> str:
    """Those of the system's own authorities that the endpoints' certificates follow from, as PEM text.

    Of those endpoints that answer. Raises `NoContactError` when none does with a certificate that the system trusts.
    """
    found: dict[str, None] = {}
    reasons = []
    for url in access.endpoints:
        host, port, _ = split_endpoint(url)
        try:
            with (
                socket.create_connection((host, port), timeout) as connection,
                _shown(ssl.create_default_context(), access).wrap_socket(connection, server_hostname=host) as tls,
            ):
                found[_root(tls)] = None
        except (OSError, ValueError) as exc:
            reasons.append(f"{url}: {exc}")
    if not found:
        raise NoContactError(
            f"no etcd of the endpoints is trusted ({'; '.join(reasons)}); is its authority none of the system's, "
            "name it with --etcd-ca"
        )
    return "".join(found)


def _root(tls: ssl.SSLSocket) -> str:
    """The last certificate of the chain by which a server was trusted, as PEM text."""
    chain: Any = tls.get_verified_chain() if hasattr(tls, "get_verified_chain") else tls._sslobj.get_verified_chain()  # type: ignore[attr-defined]
    last = chain[-1]
    return ssl.DER_cert_to_PEM_cert(last) if isinstance(last, bytes) else str(last.public_bytes())


def answers(access: Access, timeout: float) -> bool:
    """True when a server that holds a certificate of this authority listens at one of the endpoints.

    Without TLS: when anything listens there.
    """
    for url in access.endpoints:
        host, port, secure = split_endpoint(url)
        try:
            with socket.create_connection((host, port), timeout) as connection:
                if not secure:
                    return True
                with context(access).wrap_socket(connection, server_hostname=host):
                    return True
        except (OSError, ValueError):  # ssl's errors are OSErrors
            continue
    return False

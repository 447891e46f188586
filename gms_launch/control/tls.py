"""TLS with nothing but the standard library: is this server of our run? `client` has grpc's own."""

from __future__ import annotations

import os
import socket
import ssl

from gms_launch.control.access import Access, split_endpoint


def context(access: Access) -> ssl.SSLContext:
    """Trusts `access.ca` alone, and shows our certificate if there is one. Raises `ValueError` for what is no PEM."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        made.load_verify_locations(cadata=access.ca)
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

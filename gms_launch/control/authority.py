"""A certificate authority of one run: who has a certificate of it is of the run, and nobody else is.

Makes certificates, and knows nothing of who gets which. `cryptography` costs 18 MiB of memory, so it is imported only
where a certificate is made, and an agent does that in a process that ends (`run.credentials`).
"""

from __future__ import annotations

import datetime
import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography import x509

#: Nodes' clocks differ: a certificate is good from so long before it was made.
BEFORE = datetime.timedelta(days=1)
#: Longer than any run: nothing of a run renews its certificates.
VALID = datetime.timedelta(days=10 * 365)


@dataclass(frozen=True)
class Leaf:
    """A certificate and its key, as PEM text."""

    cert: str
    key: str


@dataclass(frozen=True)
class Authority:
    """The certificate that all of the run trust, and the key that makes others; both PEM text."""

    cert: str
    key: str

    @classmethod
    def create(cls, name: str = "gms-launch run") -> Authority:
        """A new one."""
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(f"{name} {secrets.token_hex(4)}")
        usage = _usage(key_cert_sign=True, crl_sign=True)
        builder = (
            _builder(subject, subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(*_pem(builder, key, key))

    def leaf(self, cn: str, hosts: Sequence[str] = (), server: bool = False, client: bool = False) -> Leaf:
        """A certificate for `cn`, good as a server's on `hosts` (names and addresses), as a client's, or as both."""
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID as Use

        ours = x509.load_pem_x509_certificate(self.cert.encode())
        signer: Any = serialization.load_pem_private_key(self.key.encode(), None)
        key = ec.generate_private_key(ec.SECP256R1())
        uses = [*([Use.SERVER_AUTH] if server else []), *([Use.CLIENT_AUTH] if client else [])]
        builder = (
            _builder(_name(cn), ours.subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if hosts:
            names = x509.SubjectAlternativeName([_host(h) for h in dict.fromkeys(hosts)])
            builder = builder.add_extension(names, critical=False)
        return Leaf(*_pem(builder, key, signer))


def _builder(subject: x509.Name, issuer: x509.Name, public: Any) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BEFORE)
        .not_valid_after(now + VALID)
    )


def _pem(builder: x509.CertificateBuilder, key: Any, signer: Any) -> tuple[str, str]:
    from cryptography.hazmat.primitives import hashes, serialization

    cert = builder.sign(signer, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return cert.public_bytes(serialization.Encoding.PEM).decode(), private.decode()


def _name(cn: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)])


def _usage(**true: bool) -> x509.KeyUsage:
    from cryptography import x509

    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
    )
    return x509.KeyUsage(
        **{name: true.get(name, False) for name in names.split()}, encipher_only=False, decipher_only=False
    )


def _host(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return x509.DNSName(host)

"""Certificates: how long they are valid, and a set of them for trials; the only module that imports cryptography."""

import contextlib
import datetime
import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mfdist.errors import ConfigError
from mfdist.table_server.auth import ALL_RIGHTS, Right, new_token

_CLOCK_SKEW = datetime.timedelta(minutes=5)  # of the machines that will check them
_TRIAL_TOKENS: dict[str, frozenset[Right]] = {
    "admin": ALL_RIGHTS,
    "trainer": ALL_RIGHTS,  # it makes tables, and has servers save and load them
    "reader": frozenset({"read"}),
}


def init_tls(folder: Path, hosts: Sequence[str] = (), days: float = 365.0) -> list[Path]:
    """Write what servers and clients need to trust each other, and return the files' paths.

    An authority (ca.pem, ca.key), a server's certificate (server.pem, server.key), a client's (client.pem, client.key),
    and tokens: tokens.toml for servers; admin.token, trainer.token and reader.token for clients. Keys and tokens can be
    read by their owner alone. Servers do not need ca.key: keep it where new certificates are made.

    Args:
        folder: made where it is missing; must not hold an authority yet.
        hosts: names and IP addresses of the servers, besides this machine's name, localhost and loopback.
        days: how long the certificates are valid.

    Raises:
        ConfigError: the folder holds an authority already, or cannot be written. Nothing was overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    names = list(dict.fromkeys([*hosts, socket.gethostname(), "localhost", "127.0.0.1", "::1"]))
    lifetime = datetime.timedelta(days=days)
    authority = _Authority(lifetime)
    server_key, server = authority.sign("mfdist table server", lifetime, names)
    client_key, client = authority.sign("mfdist client", lifetime)
    contents = {
        "ca.pem": authority.certificate,
        "ca.key": authority.key,
        "server.pem": server,
        "server.key": server_key,
        "client.pem": client,
        "client.key": client_key,
    }
    for name, content in contents.items():
        _write_new(folder / name, content, 0o644 if name.endswith(".pem") else 0o600)
    tokens = folder / "tokens.toml"
    for client_name, rights in _TRIAL_TOKENS.items():
        token = new_token(tokens, client_name, rights)
        _write_new(folder / f"{client_name}.token", f"{token}\n".encode(), 0o600)
    return [*(folder / name for name in contents), tokens, *(folder / f"{name}.token" for name in _TRIAL_TOKENS)]


def valid_until(pem: bytes, path: Path) -> datetime.datetime:
    """Return when the first certificate of a PEM file ends; `path` names it in messages.

    Raises:
        ConfigError: there is none, or it is not valid now.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ConfigError(f"a certificate must be PEM; {path} is not; check the path") from None
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = datetime.datetime.now(datetime.UTC)
    if not begin <= now <= end:
        problem = f"expired on {end:%Y-%m-%d %H:%M} UTC" if now > end else f"begins on {begin:%Y-%m-%d %H:%M} UTC"
        raise ConfigError(f"a certificate must be valid now; {path} {problem}; put a new one there, or set the clock")
    return end


class _Authority:
    """An authority that lives as long as this object: its key is written, and not read again."""

    def __init__(self, lifetime: datetime.timedelta) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("mfdist trial authority")
        self._certificate = (
            _builder(self._name, self._name, self._key.public_key(), self._key.public_key(), lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(is_authority=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = self._certificate.public_bytes(serialization.Encoding.PEM)
        self.key = _pem(self._key)

    def sign(self, name: str, lifetime: datetime.timedelta, hosts: Sequence[str] = ()) -> tuple[bytes, bytes]:
        """Return key and certificate, PEM: a server's where there are hosts, else a client's."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            _builder(_name(name), self._name, key.public_key(), self._key.public_key(), lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(is_authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        if hosts:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False
            )
        return _pem(key), builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + lifetime) - _CLOCK_SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    return x509.DNSName(host)


def _key_usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_new(path: Path, content: bytes, mode: int) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
    except FileExistsError:
        raise ConfigError(f"--init-tls needs a folder without certificates; {path} exists; choose another") from None
    except OSError as error:
        raise ConfigError(f"--init-tls needs a folder to write to; {path}: {error.strerror}; choose another") from None

"""The server's side of TLS: credentials that follow the files they are read from, so that they can be renewed."""

import datetime
import logging
import threading
from pathlib import Path

import grpc

from mfdist.errors import ConfigError
from mfdist.table_server.auth import read_secret
from mfdist.table_server.certificates import valid_until
from mfdist.table_server.limits import Sieve
from mfdist.table_server.sections import SecurityConfig

_WARN_BEFORE = datetime.timedelta(days=14)

_logger = logging.getLogger(__name__)


def server_credentials(security: SecurityConfig) -> grpc.ServerCredentials | None:
    """Return the credentials to listen with; None where there is no certificate.

    With `client_ca` clients without a valid certificate of that authority do not get past the handshake; gRPC itself
    says so on stderr, with the reason. Files that change are read again at the next connection.

    Raises:
        ConfigError: a file cannot be read or is no certificate, others may read the key, or a certificate is not valid
            now.
    """
    if security.certificate is None or security.private_key is None:
        return None
    identity = _Identity(security.certificate, security.private_key, security.client_ca)
    return grpc.dynamic_ssl_server_credentials(
        identity.configuration, identity.renewed, require_client_authentication=security.client_ca is not None
    )


class _Identity:
    """A certificate and its key as they lie on disk; called by gRPC's threads, at each handshake."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._lock = threading.Lock()
        self._complaints = Sieve(per_minute=1.0)
        self._stamps = self._look()
        self.configuration, self._until = self._read()

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what to use from now on where the files have changed; None where all stays as it is."""
        with self._lock:
            try:
                stamps = self._look()
                if stamps != self._stamps:
                    configuration, self._until = self._read()
                    self._stamps = stamps  # only now: files that were read half-written are read again
                    _logger.info("certificates read again", extra={"fields": {"valid_until": self._until.isoformat()}})
                    return configuration
                if datetime.datetime.now(datetime.UTC) > self._until:
                    raise ConfigError(
                        f"the certificate {self._certificate} expired on {self._until:%Y-%m-%d}; renew it"
                    )
            except ConfigError as error:
                if self._complaints.passes("")[0]:
                    _logger.error("clients cannot trust this server: %s", error)
            return None

    def _look(self) -> list[tuple[int, int]]:
        found = []
        for path in (self._certificate, self._key, *([self._client_ca] if self._client_ca else [])):
            try:
                status = path.stat()
            except OSError as error:
                raise ConfigError(f"a certificate must be readable; {path}: {error.strerror}; check the path") from None
            found.append((status.st_mtime_ns, status.st_ino))
        return found

    def _read(self) -> tuple[grpc.ServerCertificateConfiguration, datetime.datetime]:
        chain = read_public(self._certificate)
        until = valid_until(chain, self._certificate)
        left = until - datetime.datetime.now(datetime.UTC)
        if left < _WARN_BEFORE:
            _logger.warning("the certificate %s expires in %d days; renew it", self._certificate, left.days)
        roots = None
        if self._client_ca is not None:
            roots = read_public(self._client_ca)
            valid_until(roots, self._client_ca)
        pair = (read_secret(self._key, "the private key"), chain)
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots), until


def read_public(path: Path) -> bytes:
    """Return the bytes of a certificate's file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"a certificate must be readable; {path}: {error.strerror}; check the path") from None

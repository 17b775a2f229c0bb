"""TLS against real servers: who is trusted, who is refused, what is said, and how certificates are renewed."""

import asyncio
import datetime
import shutil
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from mfdist.errors import ConfigError
from mfdist.table_server.certificates import init_tls, valid_until
from mfdist.table_server.channel import ChannelConfig, client_channel
from mfdist.table_server.proto import table_v1_pb2 as pb
from mfdist.table_server.proto.table_v1_pb2_grpc import TableServiceStub
from mfdist.table_server.sections import SecurityConfig
from mfdist.table_server.tls import server_credentials
from tests.table_server.served import Config, serving, until

ROOT = Path(__file__).parents[2]
DEADLINE_S = 10.0


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of certificates and tokens that are valid."""
    folder = tmp_path_factory.mktemp("trusted")
    init_tls(folder)
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of certificates of another authority."""
    folder = tmp_path_factory.mktemp("stranger")
    init_tls(folder)
    return folder


def security(folder: Path, *, is_mutual: bool) -> SecurityConfig:
    return SecurityConfig(
        certificate=folder / "server.pem",
        private_key=folder / "server.key",
        client_ca=folder / "ca.pem" if is_mutual else None,
        token_file=folder / "tokens.toml",
    )


def ask(address: str, config: ChannelConfig) -> str:
    """Return the server's id, asked over a new connection."""

    async def call() -> str:
        async with client_channel(address, config) as channel:
            reply = await TableServiceStub(channel).Describe(  # type: ignore[no-untyped-call]
                pb.DescribeRequest(), timeout=DEADLINE_S
            )
            return str(reply.server_id)

    return asyncio.run(call())


def refused(address: str, config: ChannelConfig) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        ask(address, config)
    return caught.value.code()


def with_certificate(folder: Path, ca: Path | None = None) -> ChannelConfig:
    return ChannelConfig(
        ca=(ca or folder) / "ca.pem",
        certificate=folder / "client.pem",
        private_key=folder / "client.key",
        token_file=folder / "reader.token",
    )


def test_what_a_trial_needs_is_made_at_once_and_never_overwritten(tmp_path: Path) -> None:
    paths = init_tls(tmp_path / "tls", ["tables.example.org", "10.1.2.3"])
    assert sorted(path.name for path in paths) == [
        "admin.token", "ca.key", "ca.pem", "client.key", "client.pem", "reader.token", "server.key", "server.pem",
        "tokens.toml", "trainer.token",
    ]  # fmt: skip
    for path in paths:
        assert path.suffix == ".pem" or stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    server = x509.load_pem_x509_certificate((tmp_path / "tls" / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"tables.example.org", "localhost"} <= set(names.get_values_for_type(x509.DNSName))
    assert {"10.1.2.3", "127.0.0.1", "::1"} <= set(map(str, names.get_values_for_type(x509.IPAddress)))
    before = [path.read_bytes() for path in paths]
    with pytest.raises(ConfigError, match=r"ca\.pem exists; choose another"):
        init_tls(tmp_path / "tls")
    assert [path.read_bytes() for path in paths] == before
    digests = (tmp_path / "tls" / "tokens.toml").read_text("utf-8")
    assert not any(path.read_text("ascii").strip() in digests for path in paths if path.suffix == ".token")


def test_the_certificates_pass_the_strictest_checks(trusted: Path) -> None:
    """As Python 3.13 and OpenSSL's x509_strict want them."""
    context = ssl.create_default_context(cafile=str(trusted / "ca.pem"))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_cert_chain(trusted / "client.pem", trusted / "client.key")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(trusted / "server.pem", trusted / "server.key")
    server.load_verify_locations(trusted / "ca.pem")
    server.verify_mode, server.verify_flags = ssl.CERT_REQUIRED, server.verify_flags | ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        context.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert ends == []


@pytest.mark.parametrize("is_mutual", [False, True])
def test_a_trusted_client_gets_in(trusted: Path, is_mutual: bool) -> None:
    with serving(Config(security=security(trusted, is_mutual=is_mutual))) as served:
        assert ask(served.address, with_certificate(trusted)) == "echo"
        no_token = ChannelConfig(ca=trusted / "ca.pem", certificate=trusted / "client.pem",
                                 private_key=trusted / "client.key")  # fmt: skip
        assert refused(served.address, no_token) is grpc.StatusCode.UNAUTHENTICATED


def test_who_speaks_no_tls_or_is_not_known_does_not_get_in(trusted: Path, stranger: Path) -> None:
    plain = ChannelConfig()
    without_certificate = ChannelConfig(ca=trusted / "ca.pem", token_file=trusted / "reader.token")
    with serving(Config(security=security(trusted, is_mutual=True))) as served:
        for config in (plain, without_certificate, with_certificate(stranger, ca=trusted)):
            assert refused(served.address, config) is grpc.StatusCode.UNAVAILABLE
        assert served.count('mfdist_requests_total{code="OK",method="Describe"}') == 0
        assert ask(served.address, with_certificate(trusted)) == "echo"


def test_a_server_of_another_authority_is_not_trusted(trusted: Path, stranger: Path) -> None:
    with serving(Config(security=security(stranger, is_mutual=False))) as served:
        config = ChannelConfig(ca=trusted / "ca.pem", token_file=trusted / "reader.token")
        assert refused(served.address, config) is grpc.StatusCode.UNAVAILABLE


SERVER = """
import sys
from pathlib import Path
from mfdist.table_server.logs import configure
from tests.table_server.served import Config, serving
from tests.table_server.test_tls import security
configure(Config().logs)
with serving(Config(security=security(Path(sys.argv[1]), is_mutual=True))) as served:
    print(served.address, flush=True)
    sys.stdin.read()
"""


def test_refused_handshakes_are_said_on_stderr(trusted: Path, tmp_path: Path) -> None:
    """A client whose certificate expired, one without, and one without TLS: gRPC refuses them, and says why."""
    key, certificate = expired_client(trusted)
    errors = tmp_path / "stderr"
    with errors.open("wb") as stderr:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(trusted)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=stderr,
        )  # fmt: skip
    try:
        assert server.stdout is not None
        address = server.stdout.readline().decode().strip()
        roots = (trusted / "ca.pem").read_bytes()
        attempts = {
            "certificate has expired": grpc.ssl_channel_credentials(roots, key, certificate),
            "PEER_DID_NOT_RETURN_A_CERTIFICATE": grpc.ssl_channel_credentials(roots),
            "WRONG_VERSION_NUMBER": None,
        }
        for credentials in attempts.values():
            channel = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
            with channel, pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/mfdist.table.v1.TableService/Describe")(b"", timeout=DEADLINE_S)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert ask(address, with_certificate(trusted)) == "echo"
        for reason in attempts:
            until(lambda: reason in errors.read_text("utf-8"))  # noqa: B023
    finally:
        server.communicate(timeout=30)
    assert server.returncode == 0


def expired_client(folder: Path) -> tuple[bytes, bytes]:
    """Return key and certificate of a client that this authority signed, and that expired yesterday."""
    authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    key = (folder / "client.key").read_bytes()
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "late")]))
        .issuer_name(authority.subject)
        .public_key(serialization.load_pem_private_key(key, None).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=3))
        .not_valid_after(now - datetime.timedelta(days=1))
        .sign(signer, hashes.SHA256())  # type: ignore[arg-type]
    )
    return key, certificate.public_bytes(serialization.Encoding.PEM)


def test_an_expired_certificate_is_not_used(tmp_path: Path) -> None:
    init_tls(tmp_path / "old", days=-1)
    with pytest.raises(ConfigError, match=r"must be valid now; .*server\.pem expired on \d{4}-\d\d-\d\d"):
        server_credentials(security(tmp_path / "old", is_mutual=False))

    async def connect() -> None:
        client_channel("127.0.0.1:1", with_certificate(tmp_path / "old"))

    with pytest.raises(ConfigError, match=r"must be valid now; .*ca\.pem expired on"):
        asyncio.run(connect())


def test_a_renewed_certificate_is_used_without_a_restart(trusted: Path, stranger: Path, tmp_path: Path) -> None:
    folder = tmp_path / "server"
    shutil.copytree(trusted, folder)
    old = ChannelConfig(ca=trusted / "ca.pem", token_file=trusted / "reader.token")
    new = ChannelConfig(ca=stranger / "ca.pem", token_file=trusted / "reader.token")
    with serving(Config(security=security(folder, is_mutual=False))) as served:
        assert ask(served.address, old) == "echo"
        (folder / "server.pem").write_bytes(b"half-written")
        assert ask(served.address, old) == "echo"
        for name in ("server.key", "server.pem"):
            (folder / name).write_bytes((stranger / name).read_bytes())
        assert ask(served.address, new) == "echo"
        assert refused(served.address, old) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "must be PEM"), (b"-----BEGIN CERTIFICATE-----\nAAAA\n", "must be PEM")]
)
def test_what_is_no_certificate_is_said_to_be_none(content: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        valid_until(content, Path("x.pem"))


def test_a_key_that_others_may_read_is_refused(trusted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    shutil.copytree(trusted, folder)
    (folder / "server.key").chmod(0o644)
    with pytest.raises(ConfigError, match=r"the private key must not be open to others; .* 0644; chmod 600"):
        server_credentials(security(folder, is_mutual=False))

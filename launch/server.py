"""A table server as an actor: `mfdist serve`, at an address that its trainers are told."""

import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfdist.errors import MfdistError, UnavailableError
from mfdist.launch import cluster
from mfdist.launch.code_copy import expected_whole
from mfdist.launch.happenings import Ended
from mfdist.launch.pulse import Post, Pulse, settle

_DRAIN_S = 2.0  # for calls that run; clients repeat what was cut off


@dataclass(frozen=True, kw_only=True)
class Duty:
    """What a server is to hold, and for whom.

    Args:
        data: its folder.
        secrets: the job's folder of certificates and tokens.
        address: where it was before, to be there again if that is this host; empty: anywhere.
        peer: number of the other server of its pair; None: there is none.
    """

    data: str
    secrets: str
    address: str = ""
    peer: int | None = None


class TableServer:
    """One server. `serve` once, in the process's main thread."""

    def __init__(self, post: Post, supervisor: Any) -> None:
        settle(post)
        self._host = cluster.own_address()
        self._pulse = Pulse(post, self._host, cluster.caller(supervisor, "beat"))

    def serve(self, duty: Duty) -> Ended:
        """Serve until SIGTERM, or until the supervisor asks to stop; return how it went."""
        post = self._pulse.post
        how, kind, message = "stopped", "", ""
        try:
            with expected_whole(self._host):
                self._serve(duty)
        except MfdistError as error:
            traceback.print_exc()
            how, kind, message = "failed", error.kind, str(error)
        except Exception as error:  # noqa: BLE001 - told to the supervisor, which decides
            traceback.print_exc()
            how, message = "failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        sys.stderr.flush()
        self._pulse.finish()
        return Ended("server", post.index, post.incarnation, how, kind, message)  # type: ignore[arg-type]

    def _serve(self, duty: Duty) -> None:
        from mfdist.table_server.addresses import is_loopback, join_address, split_address
        from mfdist.table_server.config import ReplicationConfig, ServerConfig, ServerSection
        from mfdist.table_server.pairing import Pairing
        from mfdist.table_server.sections import SecurityConfig
        from mfdist.table_server.server import serve

        secrets = Path(duty.secrets)
        anywhere = join_address(self._host, 0)
        security: dict[str, Any] = {"token_file": secrets / "tokens.toml"}
        if not is_loopback(anywhere):
            security |= {"certificate": secrets / "server.pem", "private_key": secrets / "server.key"}
        pairing, replication = None, ReplicationConfig()
        if duty.peer is not None:
            pairing, replication = Pairing(), ReplicationConfig(**access(secrets, is_loopback(anywhere)))
            peer = duty.peer
            self._pulse.follow(lambda addresses: pairing.tell(addresses[peer]), lambda: pairing.state)

        def listen(address: str) -> None:
            section = ServerSection(
                data=Path(duty.data), listen=address, threads=self._pulse.post.threads, drain_s=_DRAIN_S
            )
            config = ServerConfig(server=section, replication=replication, security=SecurityConfig(**security))
            serve(config, lambda bound, _: self._pulse.be_ready(bound), pairing=pairing)

        if duty.address and split_address(duty.address, "a server's address")[0] == self._host:
            try:
                listen(duty.address)
            except UnavailableError as error:  # perhaps the port is another's by now
                sys.stderr.write(f"{error}\n")
            else:
                return
        listen(anywhere)


def access(secrets: Path, is_local: bool) -> dict[str, Any]:
    """Return how a job's processes reach its table servers, as keys of `[servers]` and of `[replication]`.

    Args:
        secrets: the job's folder of certificates and tokens.
        is_local: whether all of them listen on loopback, and so without TLS.
    """
    keys: dict[str, Any] = {"token_file": secrets / "admin.token"}
    # The certificate is the job's own; whatever host a server is on, it says localhost.
    return keys if is_local else {**keys, "ca": secrets / "ca.pem", "server_name": "localhost"}

"""Who is let in: tokens, rights and limits, before anything of a request is parsed."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from grpc import StatusCode

from mfdist.table_server.auth import ALL_RIGHTS, Client, Tokens, bearer_token, right_for
from mfdist.table_server.calls import Call, Refusal
from mfdist.table_server.limits import ClientLimits, Sieve
from mfdist.table_server.sections import LimitsConfig, SecurityConfig

_ENDLESS = "Replicate"  # lasts as long as the servers of a pair do, and moves what all clients do
_LINES_PER_MINUTE = 10.0  # of refusals of one host and reason

_logger = logging.getLogger(__name__)


class Admission:
    """Lets calls in or raises a `Refusal`. Called in the event loop alone.

    With a token file every call needs a token; without one, whoever reaches the server may do everything, and
    `check_exposure` has seen to it that this is meant. A right token is never kept out by wrong ones from its host:
    tokens cannot be guessed, and one client that is set up wrongly must not stop the others beside it.

    Raises:
        ConfigError: the token file is wrong, or others may read it.
    """

    def __init__(self, security: SecurityConfig, limits: LimitsConfig) -> None:
        self._tokens = Tokens(security.token_file) if security.token_file is not None else None
        self._has_client_certificates = security.client_ca is not None
        self._failures = Sieve(security.failed_attempts_per_minute)
        self._lines = Sieve(_LINES_PER_MINUTE)
        self._limits = ClientLimits(limits)

    @contextlib.contextmanager
    def admitting(self, call: Call, context: Any) -> Iterator[None]:
        """Hold the call's place while it is answered.

        Raises:
            Refusal: no token or an unknown one, a missing right, or over a limit.
        """
        right = right_for(call.method)
        if right is None:  # probes
            yield
            return
        client = call.client = self._client_of(call, context)
        if right not in client.rights:
            raise Refusal(
                "right",
                StatusCode.PERMISSION_DENIED,
                f'{call.name} needs the right "{right}"; {client.name} has {", ".join(sorted(client.rights))}; '
                "give it that right in the server's token file",
            )
        self._check_rates(client.name)
        if not self._limits.enter(client.name):
            raise Refusal(
                "in_flight",
                StatusCode.RESOURCE_EXHAUSTED,
                f"{client.name} must have at most {self._limits.max_in_flight} requests in flight "
                "(limits.max_requests_in_flight); wait for some of them",
                kind="unavailable",
                wait_s=0.05,
            )
        try:
            yield
        finally:
            self._limits.leave(client.name)
            if call.name != _ENDLESS:
                self._limits.bytes[client.name].charge(call.request_bytes + call.reply_bytes)

    def check_size(self, call: Call, num_bytes: int) -> None:
        """Count a message that arrived.

        Raises:
            Refusal: it, or the request so far, is too large.
        """
        call.request_bytes += num_bytes
        for name, what, size, limit in (
            ("max_message_mib", "a message", num_bytes, self._limits.max_message_bytes),
            ("max_request_mib", "a request", call.request_bytes, self._limits.max_request_bytes),
        ):
            if size > limit and (size == num_bytes or call.name != _ENDLESS):
                raise Refusal(
                    "size",
                    StatusCode.RESOURCE_EXHAUSTED,
                    f"{what} must be at most {limit} bytes (limits.{name}); got {size} in {call.name}; "
                    "send less at a time",
                )

    def log(self, call: Call, refusal: Refusal) -> None:
        """Write a refusal to the log, unless there were many like it; the next one says how many were left out."""
        if not refusal.is_new:
            return
        passes, held = self._lines.passes(f"{call.host} {refusal.reason}")
        if passes:
            fields = {**call.fields(), "reason": refusal.reason, "code": refusal.code.name}
            if held:
                fields["more_like_it"] = held
            _logger.warning("refused: %s", refusal, extra={"fields": fields})

    def _client_of(self, call: Call, context: Any) -> Client:
        if self._tokens is None:
            return Client(self._certificate_name(context) or call.host, ALL_RIGHTS)
        token = bearer_token(context.invocation_metadata())
        client = self._tokens.client_of(token) if token is not None else None
        if client is not None:
            return client
        wait_s = self._failures.wait_s(call.host)
        passes, held = self._failures.passes(call.host)
        if not passes:
            raise Refusal(
                "token",
                StatusCode.RESOURCE_EXHAUSTED,
                f"wrong or missing tokens must be few (security.failed_attempts_per_minute); {call.host} sent "
                "too many; mend the client's token, then try again",
                wait_s=wait_s,
                is_new=False,
            )
        more = f"; {held} more from there were turned away since" if held else ""
        problem = "got one that is not in the server's file"
        if token is None:
            has_any = any(key == "authorization" for key, _ in context.invocation_metadata() or ())
            problem = 'got something else than "Bearer TOKEN"' if has_any else "got none"
        raise Refusal(
            "token",
            StatusCode.UNAUTHENTICATED,
            f'{call.name} needs a token in the metadata, "authorization: Bearer TOKEN"; {problem}; '
            f"ask the server's operator for one{more}",
        )

    def _certificate_name(self, context: Any) -> str | None:
        if not self._has_client_certificates:
            return None
        names = context.auth_context().get("x509_common_name")
        return names[0].decode("utf-8", "replace") if names else None

    def _check_rates(self, client: str) -> None:
        # Bytes are charged when they have moved: a client in debt waits with its next request, not in mid-push.
        for reason, what, wait_s in (
            ("bytes", "fewer bytes a second (limits.mib_per_s)", self._limits.bytes[client].wait_s()),
            ("rate", "fewer requests a second (limits.requests_per_s)", self._limits.requests[client].take()),
        ):
            if wait_s:
                raise Refusal(
                    reason,
                    StatusCode.RESOURCE_EXHAUSTED,
                    f"{client} must ask for {what}; try again in {wait_s:.3f} s",
                    kind="unavailable",
                    wait_s=wait_s,
                )

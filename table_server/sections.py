"""The sections of a server's configuration that are about its surroundings: who may ask, how much, and who looks on."""

from pathlib import Path
from typing import Annotated, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """A section: frozen, and without keys that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class SecurityConfig(Section):
    """Who may talk to the server. An address that is not loopback needs a certificate and tokens, or `insecure`."""

    token_file: Path | None = Field(
        default=None, description="TOML file of tokens and their rights; others must not be able to read it"
    )
    certificate: Path | None = Field(default=None, description="the server's certificate, PEM; turns TLS on")
    private_key: Path | None = Field(default=None, description="its key, PEM; others must not be able to read it")
    client_ca: Path | None = Field(
        default=None, description="PEM; turns mutual TLS on: clients need a certificate that this authority signed"
    )
    insecure: bool = Field(
        default=False, description="any address without TLS or tokens; all who reach it may do anything"
    )
    failed_attempts_per_minute: Count = Field(
        default=10,
        description="wrong tokens of one host before it is told to wait; more are not logged one by one",
    )

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key must be given together; got one of them; add the other")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca needs the server's own certificate and private_key; add them, or leave it out")
        return self


class LimitsConfig(Section):
    """How much one client may ask for: the name of its token, or else its certificate's, or else its host."""

    max_message_mib: Positive = Field(
        default=16.0,
        description="MiB of one message; clients send about 2, and more where one row or token is wider than that",
    )
    max_request_mib: Positive = Field(default=4096.0, description="MiB of all messages of one request")
    max_requests_in_flight: Count = Field(default=256, description="requests of one client at a time")
    requests_per_s: NonNegative = Field(
        default=0.0, description="requests of one client a second, with bursts of 2 s; 0: any"
    )
    mib_per_s: NonNegative = Field(
        default=0.0, description="MiB of one client a second, both ways together, with bursts of 2 s; 0: any"
    )


class MetricsConfig(Section):
    """Figures for Prometheus."""

    listen: str = Field(default="", description="HOST:PORT of the metrics page, such as 127.0.0.1:9464; empty: none")


class LogsConfig(Section):
    """What the server writes on stderr."""

    format: Literal["text", "json"] = Field(default="text", description="lines for people, or one JSON object a line")
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="the least that is written; debug has a line for each request"
    )


class TracesConfig(Section):
    """OpenTelemetry spans of requests (pip install mfdist[traces])."""

    endpoint: str = Field(
        default="", description="OTLP collector, gRPC, such as http://127.0.0.1:4317; empty: no spans"
    )
    sample_ratio: float = Field(
        default=0.01,
        ge=0.0,
        le=1.0,
        description="share of requests that get a span; a caller's own decision goes before",
    )
    service_name: str = Field(default="mfdist-table-server", description="service.name of the spans")


class Surroundings(Protocol):
    """A configuration with the sections above; `ServerConfig` is one."""

    @property
    def security(self) -> SecurityConfig:
        """Who may talk to the server."""

    @property
    def limits(self) -> LimitsConfig:
        """How much one client may ask for."""

    @property
    def metrics(self) -> MetricsConfig:
        """Figures for Prometheus."""

    @property
    def logs(self) -> LogsConfig:
        """What the server writes on stderr."""

    @property
    def traces(self) -> TracesConfig:
        """OpenTelemetry spans."""

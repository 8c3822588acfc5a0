"""What a client is built from: TLS material, the retry policy, and the limits that hold for every call."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from sluice_client.errors import InvalidRequest

DEFAULT_DEADLINE_S: Final = 30.0  # far above any healthy inference, far below the patience of whoever waits for it
LOAD_DEADLINE_S: Final = 600.0  # a load answers when the model is up, and large ones warm up for minutes
STREAM_CLOSE_S: Final = 30.0  # how long a closed stream waits for answers: as long as their callers do by default
STREAM_IN_FLIGHT_MAX: Final = 65_536  # requests of one stream: far above what servers take ahead, and memory is finite
DEFAULT_PORT: Final = 8001  # where servers of this protocol listen for gRPC
MAX_DEADLINE_S: Final = 365 * 86_400.0  # beyond it gRPC's own arithmetic on deadlines overflows
MAX_MESSAGE_BYTES: Final = 2**31 - 1  # INT32_MAX, the largest that gRPC and protobuf can express


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS for all endpoints of a client; every field is PEM text as bytes.

    `root_certificates`: whom to trust (None: the authorities that gRPC ships with). `certificate_chain` and
    `private_key`: who we are (mTLS; both or none). `server_name`: the name that the server's certificate must carry
    when it is not the endpoint's host.
    """

    root_certificates: bytes | None = None
    certificate_chain: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    server_name: str = ""

    def __post_init__(self) -> None:
        if (self.certificate_chain is None) != (self.private_key is None):
            raise InvalidRequest("TLS: certificate_chain and private_key belong together, and one of them is missing")
        for name in ("root_certificates", "certificate_chain", "private_key"):
            value = getattr(self, name)
            if value is not None and b"-----BEGIN" not in value:
                raise InvalidRequest(f"TLS: {name} is not PEM text (use Tls.from_files for file names)")

    @classmethod
    def from_files(
        cls,
        *,
        root_certificates: str | Path | None = None,
        certificate_chain: str | Path | None = None,
        private_key: str | Path | None = None,
        server_name: str = "",
    ) -> Self:
        """The same from PEM files, read now. OSError when one cannot be read."""

        def read(path: str | Path | None) -> bytes | None:
            return None if path is None else Path(path).read_bytes()

        return cls(read(root_certificates), read(certificate_chain), read(private_key), server_name)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a call that is safe to repeat is repeated, always within its deadline.

    Before retry n (from 0) the client waits a random time between 0 and
    `min(max_backoff_s, initial_backoff_s * multiplier**n)`, unless the server named the wait. Retries spend a budget
    that all calls of the client share (gRFC A6, retryThrottling): a failure takes 1 token, a success gives
    `budget_ratio` back, and there are no retries while half of `budget_tokens` or less is left.
    """

    max_attempts: int = 4
    initial_backoff_s: float = 0.05
    max_backoff_s: float = 2.0
    multiplier: float = 2.0
    budget_tokens: int = 100  # 50 retries at once, so that a broken connection does not fail all it carried
    budget_ratio: float = 0.1  # in the long run at most one retry for ten successes

    def __post_init__(self) -> None:
        for name, least in (("max_attempts", 1), ("multiplier", 1.0), ("budget_tokens", 1)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"RetryPolicy: {name} is {getattr(self, name)}, at least {least} is needed")
        for name in ("initial_backoff_s", "max_backoff_s", "budget_ratio"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidRequest(f"RetryPolicy: {name} is {getattr(self, name)}, must be finite and not negative")


NO_RETRIES: Final = RetryPolicy(max_attempts=1)

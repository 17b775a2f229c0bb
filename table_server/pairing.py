"""A pair whose servers learn while they run where the other one is, told by whoever started both."""

from mfdist.table_server.standing import Standing


class Pairing:
    """What one server of a pair is told and asked from outside its event loop; may be called by any thread.

    Where the other one is may change: it was started again elsewhere.
    """

    def __init__(self) -> None:
        self._peer = ""
        self._standing: Standing | None = None

    def tell(self, peer: str) -> None:
        """Say where the other server is, HOST:PORT; the primary links to it from its next attempt on."""
        self._peer = peer
        if self._standing is not None:
            self._standing.peer = peer

    def begin(self, standing: Standing) -> None:
        """Be of the server that is starting."""
        self._standing = standing
        standing.peer = self._peer

    @property
    def state(self) -> str:
        """Return the server's role as people see it, see `Standing.state`; empty before it has one."""
        return "" if self._standing is None else self._standing.state

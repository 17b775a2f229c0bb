"""What tests of several hosts need, and why they are skipped where it is missing."""

import pytest

from tests.distributed.hosts import why_not


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skip where this machine may not make network namespaces."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)

"""What metrics ask of a server's `Node`."""

import time
from collections.abc import Iterator

from mfdist.table_server.metrics import Observed, TableFigures
from mfdist.table_server.node import Node


def observed(node: Node) -> Observed:
    """Return the questions that metrics put to `node`, from threads of their own; none of them waits."""

    def tables() -> Iterator[TableFigures]:
        saved = node.store.saved_versions
        for life in node.lives:
            shard = life.shard
            yield TableFigures(
                name=shard.name,
                version=shard.version,
                num_rows=shard.spec.region.shape[0],
                num_bytes=shard.num_bytes,
                row_hits=node.row_hits[shard.name],
                saved_version=min(saved.get(shard.name, 0), shard.version),
                replica_lag=node.standing.lag(life.name, shard.version),
            )

    return Observed(
        tables=tables,
        queue_depth=lambda: float(node.num_queued),
        log_bytes=lambda: float(node.store.unsaved_bytes),
        log_pending_bytes=lambda: float(node.store.ledger.waiting_bytes),
        checkpoint_age_s=lambda: time.monotonic() - node.store.saved_at_s,
        failing=lambda: {
            "log": node.store.ledger.failure is not None,
            "checkpoint": bool(node.checkpointer.failure),
        },
        epoch=lambda: float(node.standing.epoch),
        role=lambda: node.standing.state,
    )

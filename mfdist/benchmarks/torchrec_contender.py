"""TorchRec's sharded EmbeddingBagCollection over gloo, on the CPU, where torchrec and fbgemm-gpu-cpu are installed.

The same rows looked up by the same ids with the same weights, pooled by a sum, SGD fused into backward. TorchRec gives
the weights no gradient there, so it does less. Its table-wise sharding places whole tables, so the slots are dealt out
to as many tables as there are ranks, and their sums are added up afterwards.
"""

import contextlib
import io
import os
import warnings
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfdist.benchmarks.sharding_case import RATE, Batch, ShardingCase, first_rows


def made(kind: str, case: ShardingCase) -> "TorchRecTable | str":
    """Return TorchRec's table, or why there is none; called on all ranks."""
    if find_spec("torchrec") is None or find_spec("fbgemm_gpu") is None:
        return "torchrec and fbgemm-gpu-cpu are not installed"
    if kind == "table_wise" and (not case.code_stride or case.num_lookups % dist.get_world_size()):
        return "needs slots that divide among the ranks"
    try:
        return TorchRecTable(kind, case)
    except Exception as error:  # noqa: BLE001 - whatever it cannot do is told as it tells it
        return f"torchrec refuses: {str(error).splitlines()[0][:80]}"


class TorchRecTable:
    """One table, or one a rank, behind TorchRec's DistributedModelParallel."""

    def __init__(self, kind: str, case: ShardingCase) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
        )
        # It calls collectives by names that torch has since renamed, in every step.
        warnings.filterwarnings("ignore", category=FutureWarning)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            self._build(kind, case, world_size)

    def _build(self, kind: str, case: ShardingCase, world_size: int) -> None:
        import torchrec
        from torch.distributed.optim import _apply_optimizer_in_backward as fuse  # type: ignore[attr-defined]
        from torchrec.distributed import sharding_plan
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
        from torchrec.distributed.model_parallel import DistributedModelParallel
        from torchrec.distributed.types import ShardingPlan

        self._jagged: Any = torchrec.KeyedJaggedTensor
        self._num_parts = world_size if kind == "table_wise" else 1
        self._case = case
        names = [f"part{part}" for part in range(self._num_parts)]
        collection = torchrec.EmbeddingBagCollection(
            tables=[
                torchrec.EmbeddingBagConfig(
                    name=name,
                    embedding_dim=case.row_dim,
                    num_embeddings=case.num_rows // self._num_parts,
                    feature_names=[name],
                    pooling=torchrec.PoolingType.SUM,
                )
                for name in names
            ],
            is_weighted=True,
            device=torch.device("meta"),
        )
        fuse(torch.optim.SGD, collection.parameters(), {"lr": RATE})
        placed = {
            "column_wise": lambda part: sharding_plan.column_wise(ranks=list(range(world_size))),
            "table_wise": lambda part: sharding_plan.table_wise(rank=part),
            "row_wise": lambda part: sharding_plan.row_wise(),
        }[kind]
        sharder: Any = EmbeddingBagCollectionSharder()
        plan = sharding_plan.construct_module_sharding_plan(
            collection,
            {name: placed(part) for part, name in enumerate(names)},  # type: ignore[no-untyped-call]
            sharder=sharder,
            local_size=world_size,
            world_size=world_size,
            device_type="cpu",
        )
        self._model = DistributedModelParallel(
            collection,
            device=torch.device("cpu"),
            plan=ShardingPlan({"": plan}),
            sharders=[sharder],
            init_data_parallel=False,
        )
        self._names = names
        self._batch: Batch | None = None
        self._arguments: dict[str, Any] = {}
        self._fill()

    def forward(self, batch: Batch) -> Tensor:
        """Return the sums."""
        if batch is not self._batch:
            self._batch, self._arguments = batch, self._told(batch)
        pooled = self._model(self._jagged(**self._arguments))
        values: Tensor = (pooled.wait() if hasattr(pooled, "wait") else pooled).values()
        parts = self._num_parts
        return values if parts == 1 else values.view(-1, parts, self._case.row_dim).sum(1)

    def _told(self, batch: Batch) -> dict[str, Any]:
        """Return a batch as TorchRec takes it; made once, so that its time is not counted."""
        case, parts = self._case, self._num_parts
        num_tokens, num_lookups = batch.row_ids.shape
        each = num_lookups // parts
        ids = batch.row_ids.long() + case.code_stride * (torch.arange(num_lookups) % each)
        return {
            "keys": self._names,
            "values": ids.view(num_tokens, parts, each).transpose(0, 1).reshape(-1),
            "weights": batch.scores.detach().view(num_tokens, parts, each).transpose(0, 1).reshape(-1),
            "lengths": torch.full((parts * num_tokens,), each, dtype=torch.int32),
        }

    def _fill(self) -> None:
        """Give each shard the rows that ours start with."""
        for name, parameter in self._model.state_dict().items():
            part = self._names.index(name.split(".")[-2])
            top = part * (self._case.num_rows // self._num_parts)
            for shard in parameter.local_shards():
                row, column = shard.metadata.shard_offsets
                rows, columns = shard.tensor.shape
                shard.tensor.copy_(first_rows(self._case, (top + row, top + row + rows), (column, column + columns)))

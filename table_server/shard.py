"""One shard: a rectangle of a table's rows with their optimiser's states. Plain tensors; nothing of gRPC or disks.

Not safe to call from several threads but where it says so: the server lets readers in together and writers alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfdist.checkpoint.state import TableState
from mfdist.errors import ConfigError, RowIdError
from mfdist.kernels import gather_sum, ragged_gradient, sparse_row_gradient
from mfdist.kernels.huge_pages import in_huge_pages
from mfdist.kernels.lookup_arguments import check_grad_output, check_lookup
from mfdist.optim import RowState
from mfdist.table_server.codec import dtype_name
from mfdist.table_server.messages import ShardSpec, quoted
from mfdist.tables.initial_rows import draw_rows

#: Elements of rows that listed lookups copy at a time.
_LISTED_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Lookups:
    """Which rows to add up for which token.

    Either dense, row_ids and scores [N, K] with codes or ids as `Table.forward` takes them, `first_slot` slots further
    on; or, where there are tokens, listed: row_ids, tokens and scores [M].
    """

    row_ids: Tensor
    scores: Tensor
    tokens: Tensor | None = None
    num_tokens: int = 0
    code_stride: int = 0
    first_slot: int = 0

    def __post_init__(self) -> None:
        is_listed = self.tokens is not None
        shapes = [tuple(tensor.shape) for tensor in (self.row_ids, self.scores, self.tokens) if tensor is not None]
        if len(set(shapes)) > 1 or len(shapes[0]) != (1 if is_listed else 2):
            raise ConfigError(f"lookups need row_ids and scores [N, K], or [M] with tokens [M]; got {shapes}")
        if self.scores.dtype != torch.float32:
            raise ConfigError(f"scores must be fp32; got {self.scores.dtype}")
        if self.tokens is not None:
            if self.code_stride or self.tokens.dtype != torch.int32:
                raise ConfigError(
                    "listed lookups need row ids and int32 tokens; got "
                    f"{self.tokens.dtype} tokens, code_stride={self.code_stride}"
                )
            if len(self.tokens) and not 0 <= int(self.tokens.min()) <= int(self.tokens.max()) < self.num_tokens:
                raise ConfigError(f"tokens must lie in [0, {self.num_tokens}); got {int(self.tokens.max())}")

    @property
    def length(self) -> int:
        """Return how many tokens there are sums for."""
        return self.row_ids.shape[0] if self.tokens is None else self.num_tokens


@dataclass(frozen=True)
class Contribution:
    """One client's part of an update: its lookups and the gradient [tokens, columns] of their sums."""

    lookups: Lookups
    grad_output: Tensor


class Shard:
    """Rows [R, C] of a shard, the states beside them, and how many updates they have had.

    Args:
        spec: what it is.
        state: rows and states to begin with; drawn from the spec's seed where there are none.
        version: updates so far.

    Raises:
        ConfigError: the state does not fit the spec.
    """

    def __init__(self, spec: ShardSpec, state: TableState | None = None, version: int = 0) -> None:
        self.spec = spec
        shape, dtype = spec.region.shape, spec.table.dtype
        if state is None:
            self.rows = in_huge_pages(torch.empty(shape, dtype=dtype))
            draw_rows(self.rows, spec.table, spec.region, spec.std, spec.seed)
        elif (tuple(state.weight.shape), state.weight.dtype) != (shape, dtype):
            raise ConfigError(
                f'rows of table "{self.name}" must be {list(shape)} in {dtype}; got '
                f"{list(state.weight.shape)} in {state.weight.dtype}"
            )
        else:
            self.rows = state.weight
        self.row_state = None if spec.optimizer is None else RowState(spec.optimizer, self.rows, spec.region)
        if state is not None and self.row_state is not None:
            if state.optimizer or not self.row_state.tensors:
                self.row_state.load(dict(state.optimizer), version)
            else:  # rows that were not trained, or by another rule
                self.row_state.num_updates = version
        self.version = version

    @property
    def name(self) -> str:
        """Return the table's name."""
        return self.spec.table.name

    @property
    def num_bytes(self) -> int:
        """Return the bytes of rows and states."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def state(self) -> TableState:
        """Return rows and states as checkpoints take them; they alias the live ones."""
        tensors = self._tensors()
        return TableState(weight=tensors.pop(""), optimizer=tensors)

    def lookup(self, lookups: Lookups) -> Tensor:
        """Return the sums [tokens, C] in the rows' dtype. Safe to call from several threads.

        Raises:
            RowIdError: an id lies outside the shard.
        """
        if lookups.tokens is None:
            ids, stride = self._dense_ids(lookups)
            return gather_sum(self.rows, ids, lookups.scores, stride, self.name)
        ids, tokens = self._listed_ids(lookups.row_ids), lookups.tokens.long()
        sums = torch.zeros(lookups.num_tokens, self.rows.shape[1])
        step = max(1, _LISTED_ELEMENTS // self.rows.shape[1])
        for begin in range(0, len(ids), step):
            part = slice(begin, begin + step)
            sums.index_add_(0, tokens[part], self.rows[ids[part]].float() * lookups.scores[part, None])
        return sums.to(self.rows.dtype)

    def score_gradients(self, contribution: Contribution) -> Tensor:
        """Return the gradients of the scores, and leave the rows. Safe to call from several threads."""
        self._check_gradient(contribution)
        lookups = contribution.lookups
        if lookups.tokens is None:
            ids, stride = self._dense_ids(lookups)
            return sparse_row_gradient(self.rows, ids, lookups.scores, contribution.grad_output, stride, self.name)[2]
        listed = (self._listed_ids(lookups.row_ids), lookups.tokens, lookups.scores)
        return ragged_gradient(self.rows, *listed, contribution.grad_output, self.name)[2]

    def check(self, contribution: Contribution) -> None:
        """Raise what `update` would, without changing anything: a contribution must make sense before it is logged.

        Safe to call from several threads.
        """
        self.trained()
        self._check_gradient(contribution)
        lookups = contribution.lookups
        if lookups.tokens is not None:
            self._listed_ids(lookups.row_ids)
            return
        ids, stride = self._dense_ids(lookups)
        check_lookup(self.rows, ids, lookups.scores, stride, self.name)
        check_grad_output(self.rows, ids, contribution.grad_output, self.name)
        limit = stride or self.rows.shape[0]
        ids = ids.int() if ids.dtype == torch.uint16 else ids  # torch does not compare uint16
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
            bad = ids[(ids < 0) | (ids >= limit)][0]
            what = "codes" if stride else "row ids"
            raise RowIdError(f'{what} must lie in [0, {limit}); got {int(bad)} for table "{self.name}"')

    def update(self, contributions: Sequence[Contribution], lr: float) -> list[Tensor]:
        """Update the rows once by what all contribute, in their order; return the gradients of each one's scores.

        Gradients of scores are those of the rows before. With one contribution rows and gradients have the bits of a
        local table that is fused; with several, of one that is given their tokens one after the other.

        Raises:
            ConfigError: the rows are frozen, or shapes do not fit.
            RowIdError: an id lies outside the shard; nothing was changed.
        """
        state = self.trained()
        for contribution in contributions:
            self._check_gradient(contribution)
        state.lr = lr
        if not contributions:
            state.num_updates, made = state.num_updates + 1, []
        elif _is_alike(contributions):
            made = self._update_dense(state, contributions)
        else:
            made = self._update_listed(state, contributions)
        self.version += 1
        return made

    def gather(self, row_ids: Tensor | None, state: str) -> Tensor:
        """Return rows [U, C] or a state's values, copied; all where there are no ids. Safe from several threads.

        Raises:
            ConfigError: there is no such state, or ids are no list.
            RowIdError: an id lies outside the shard.
        """
        tensor = self._tensor(state)
        return tensor.clone() if row_ids is None else tensor[self._one_by_one(row_ids)]

    def write(self, values: Tensor, row_ids: Tensor | slice, state: str) -> None:
        """Replace rows [U, C] or a state's values, at ids of the table or at a slice of the shard.

        Raises:
            ConfigError: there is no such state, values do not fit it, or ids are no list of each row once; nothing was
                changed.
            RowIdError: an id lies outside the shard.
        """
        tensor = self._tensor(state)
        at = row_ids if isinstance(row_ids, slice) else self._one_by_one(row_ids)
        # Which of two values for a row stays would be up to the threads, and another one in the replica.
        if isinstance(at, Tensor) and len(at) != (num_rows := len(torch.unique(at))):
            raise ConfigError(
                f"a message of a write must name each row once; got {len(at)} ids of {num_rows} rows for table "
                f'"{self.name}"'
            )
        if values.shape != tensor[at].shape or values.dtype != tensor.dtype:
            raise ConfigError(
                f'values for {state or "rows"} of table "{self.name}" must be {list(tensor[at].shape)} in '
                f"{tensor.dtype}; got {list(values.shape)} in {values.dtype}"
            )
        tensor[at] = values

    def set_version(self, version: int) -> None:
        """Go on from a number of updates."""
        self.version = version
        if self.row_state is not None:
            self.row_state.num_updates = version

    def trained(self) -> RowState:
        """Return the states of rows that are trained.

        Raises:
            ConfigError: they are frozen.
        """
        if self.row_state is None:
            raise ConfigError(
                f'rows of table "{self.name}" are frozen, it was made without an optimiser; make it with one'
            )
        return self.row_state

    def _update_dense(self, state: RowState, contributions: Sequence[Contribution]) -> list[Tensor]:
        # Alike, so the first one's form is that of all.
        ids = [self._dense_ids(one.lookups) for one in contributions]
        grad_scores = state.update_by_lookup(
            self.rows,
            torch.cat([one for one, _ in ids]),
            torch.cat([one.lookups.scores for one in contributions]),
            torch.cat([one.grad_output for one in contributions]),
            ids[0][1],
            self.name,
        )
        return list(torch.split(grad_scores, [one.lookups.length for one in contributions]))

    def _update_listed(self, state: RowState, contributions: Sequence[Contribution]) -> list[Tensor]:
        ids, tokens, scores, grads, shapes = [], [], [], [], []
        first = 0
        for one in contributions:
            lookups = one.lookups
            shapes.append(lookups.scores.shape)
            if lookups.tokens is None:
                rows, stride = self._dense_ids(lookups)
                slots = torch.arange(rows.shape[1]) * stride
                ids.append((rows.long() + slots).flatten())
                tokens.append(torch.arange(first, first + len(rows)).repeat_interleave(rows.shape[1]))
            else:
                ids.append(self._listed_ids(lookups.row_ids))
                tokens.append(lookups.tokens.long() + first)
            scores.append(lookups.scores.flatten())
            grads.append(one.grad_output)
            first += lookups.length
        all_ids = torch.cat(ids)
        touched, row_grads, grad_scores = ragged_gradient(
            self.rows, all_ids, torch.cat(tokens), torch.cat(scores), torch.cat(grads), self.name, dtype=torch.float32
        )
        state.update(self.rows, row_grads, touched=touched, name=self.name)
        parts = torch.split(grad_scores, [shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _dense_ids(self, lookups: Lookups) -> tuple[Tensor, int]:
        """Return ids [N, K] as kernels take them, counted from the shard's first row, and their stride."""
        ids, stride = lookups.row_ids, lookups.code_stride
        (begin, end), num_lookups = self.spec.region.rows, lookups.row_ids.shape[1]
        if not stride:
            return (ids, 0) if begin == 0 else (self._listed_ids(ids), 0)
        if lookups.first_slot * stride == begin and num_lookups * stride == end - begin:
            return ids, stride
        codes = ids.long()
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < stride:
            bad = codes[(codes < 0) | (codes >= stride)][0]
            raise RowIdError(f'codes must lie in [0, {stride}); got {int(bad)} for table "{self.name}"')
        return self._listed_ids(codes + (lookups.first_slot + torch.arange(num_lookups)) * stride), 0

    def _listed_ids(self, row_ids: Tensor) -> Tensor:
        """Return ids of the table, counted from the shard's first row, which they must not leave."""
        if row_ids.dtype.is_floating_point:
            raise ConfigError(f'row ids must be integers; got {row_ids.dtype} for table "{self.name}"')
        begin, end = self.spec.region.rows
        ids = row_ids.long()
        if ids.numel() and not begin <= int(ids.min()) <= int(ids.max()) < end:
            bad = ids[(ids < begin) | (ids >= end)].flatten()[0]
            raise RowIdError(f'row ids must lie in [{begin}, {end}) here; got {int(bad)} for table "{self.name}"')
        return ids - begin

    def _one_by_one(self, row_ids: Tensor) -> Tensor:
        """Return ids [U] of the table, counted from the shard's first row."""
        if row_ids.ndim != 1:
            raise ConfigError(f'row_ids must be [U]; got {list(row_ids.shape)} for table "{self.name}"')
        return self._listed_ids(row_ids)

    def _check_gradient(self, contribution: Contribution) -> None:
        shape = (contribution.lookups.length, self.rows.shape[1])
        grad = contribution.grad_output
        if tuple(grad.shape) != shape or not grad.dtype.is_floating_point:
            raise ConfigError(
                f'gradients of sums of table "{self.name}" must be {list(shape)} of a floating dtype; got '
                f"{list(grad.shape)} {dtype_name(grad.dtype)}"
            )

    def _tensor(self, state: str) -> Tensor:
        tensors = self._tensors()
        if state not in tensors:
            named = ", ".join(f'"{name}"' for name in tensors if name) or "none"
            raise ConfigError(f'a state must be one of table "{self.name}": {named}; got {quoted(state)}')
        return tensors[state]

    def _tensors(self) -> dict[str, Tensor]:
        return {"": self.rows, **({} if self.row_state is None else self.row_state.tensors)}


def _is_alike(contributions: Sequence[Contribution]) -> bool:
    """Return whether all are dense and differ in their number of tokens alone."""
    forms = {
        (
            one.lookups.tokens is None,
            *one.lookups.row_ids.shape[1:],
            one.lookups.code_stride,
            one.lookups.first_slot,
            one.lookups.row_ids.dtype,
            one.grad_output.dtype,
        )
        for one in contributions
    }
    return len(forms) == 1 and contributions[0].lookups.tokens is None

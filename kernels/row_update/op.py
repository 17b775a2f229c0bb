"""row_update as torch operators: dispatch by device and in-place schemas that the compiler can follow.

A step's rate and number are tensors, so that neither compiled code nor a captured graph depends on their values.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfdist.kernels import implementation
from mfdist.kernels.lookup_arguments import check_grad_output, check_lookup
from mfdist.kernels.row_update import reference
from mfdist.kernels.row_update.arguments import check_given, check_rows, check_update, read_settings, rule_arguments
from mfdist.kernels.row_update.rule import RowRule

if TYPE_CHECKING:
    from mfdist.kernels.row_gradient.triton_ordered import Ordered

RULE_SCHEMA = (
    "str kind, float weight_decay, float eps, float beta1, float beta2, int seed, int row_offset, int column_offset"
)
torch.library.define(
    "mfdist::fused_row_update",
    "(Tensor(a!) table, Tensor(b!)[] state, Tensor row_ids, Tensor scores, Tensor grad_output, "
    f"Tensor lr, Tensor step, {RULE_SCHEMA}, int code_stride, str name) -> Tensor",
)
torch.library.define(
    "mfdist::row_update",
    "(Tensor(a!) table, Tensor(b!)[] state, Tensor grads, Tensor? rows, Tensor? mean_squares, "
    f"Tensor lr, Tensor step, {RULE_SCHEMA}, str name) -> ()",
)
#: What autograd calls with arguments that have been checked.
fused_row_update_unchecked = torch.ops.mfdist.fused_row_update.default
_row_update = torch.ops.mfdist.row_update.default


def fused_row_update(
    table: Tensor,
    state: list[Tensor],
    row_ids: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    rule: RowRule,
    lr: Tensor,
    step: Tensor,
    *,
    row_offset: int = 0,
    column_offset: int = 0,
    code_stride: int = 0,
    name: str = "table",
    ordered: "Ordered | None" = None,
) -> Tensor:
    """Update the rows a lookup read by their gradients, and return the gradient of its scores.

    The rows' gradients are never written: each row is summed, updated and stored in one pass. Rows that no id points to
    are neither read nor written, nor are their states.

    Args:
        table: [R, D], contiguous, fp32, fp16 or bf16, changed in place; bf16 is rounded stochastically. On the CPU also
            fp64, computed by the reference.
        state: the rule's tensors, changed in place: none for `sgd`; [R] in fp32 for `rowwise_adagrad`; two of [R, D] in
            fp32, bf16 or uint8 for `adam`, m and v; uint8 has them in a byte each, see `rule`. All start at 0.
        row_ids: [N, K], as given to gather_sum, and so are `scores`, `code_stride` and `name`.
        scores: [N, K].
        grad_output: [N, D], the gradient of gather_sum's output.
        rule: what is done with a row's gradient.
        lr: the learning rate, one fp32 number on the table's device.
        step: t, which update this is, counted from 1; one int64 number on the table's device.
        row_offset: the row of the whole table that is row 0 here, and
        column_offset: the column that is column 0, where this is a part. They decide the random bits alone.
        code_stride: see gather_sum.
        name: what errors call the table.
        ordered: what `order_lookups` made of this lookup, if it was asked; not in code that is compiled.

    Returns:
        The gradient of the scores, [N, K] in their dtype, from the rows as they were. Results are the same bits each
        time. A row whose gradient is not finite stays as it is, as does its state. Where a GPU takes rows in slices,
        because they are wide or seldom read, `sgd` and `adam` leave at least the slice.

    Raises:
        RowIdError: an id lies outside the table; when, see gather_sum. Nothing was changed on the CPU; on a GPU the
            lookups with good ids have been applied.
        ConfigError: shapes, dtypes or devices do not fit together. Nothing was changed.

    Cost: N·K·D elements of grad_output read, and of touched rows; touched rows and their states written.
    """
    check_lookup(table, row_ids, scores, code_stride, name)
    check_grad_output(table, row_ids, grad_output, name)
    check_update(table, state, rule, lr, step, name)
    if ordered is not None:  # which no operator takes
        torch.autograd.graph.increment_version([table, *state])
        offsets = (row_offset, column_offset)
        on_gpu = implementation.on_gpu("row_update").fused_row_update
        updated: Tensor = on_gpu(
            table, state, row_ids, scores, grad_output, lr, step, rule, offsets, code_stride, name, ordered
        )
        return updated
    made: Tensor = fused_row_update_unchecked(
        table, state, row_ids, scores, grad_output, lr, step,
        *rule_arguments(rule), row_offset, column_offset, code_stride, name,
    )  # fmt: skip
    return made


def row_update(
    table: Tensor,
    state: list[Tensor],
    grads: Tensor,
    rule: RowRule,
    lr: Tensor,
    step: Tensor,
    *,
    rows: Tensor | None = None,
    mean_squares: Tensor | None = None,
    row_offset: int = 0,
    column_offset: int = 0,
    name: str = "table",
) -> None:
    """Update rows by gradients that are there already: summed over micro-batches, or come from other ranks.

    Args:
        table: [R, D], as for `fused_row_update`; so are all arguments not told of here.
        state: the rule's tensors.
        grads: [U, D], the gradients of `rows` in their order, or [R, D], of which those of `rows` are used; fp32, fp16
            or bf16.
        rule: what is done with a row's gradient.
        lr: the learning rate.
        step: t, counted from 1.
        rows: [U], int32 or int64, the rows to update, in rising order and each once; all of them where it is None.
        mean_squares: [U], fp32, the mean of each gradient's squares over the whole row, where this is a part of the
            columns: sum `squared_sums` over the parts, divide by the whole row's width. By default the mean over the
            columns here. Only `rowwise_adagrad` uses it, but where it is not finite no rule changes the row.
        row_offset: see `fused_row_update`.
        column_offset: see `fused_row_update`.
        name: what errors call the table.

    Raises:
        RowIdError: a row lies outside the table. On the CPU nothing was changed; on a GPU the other rows were, and the
            error comes from the next call.
        ConfigError: shapes, dtypes or devices do not fit together, or, on the CPU, rows are not in rising order.

    Cost: U·D elements of gradients and rows read, rows and their states written.
    """
    check_update(table, state, rule, lr, step, name)
    check_given(table, grads, rows, mean_squares, name)
    _row_update(
        table, state, grads, rows, mean_squares, lr, step,
        *rule_arguments(rule), row_offset, column_offset, name,
    )  # fmt: skip


def squared_sums(grads: Tensor) -> Tensor:
    """Return the sum of squares of each row of [U, D], fp32 [U]: a part's share of a column-sharded row's."""
    wide = torch.promote_types(grads.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(grads, dim=1, dtype=wide)
    return norms.square().float()


@torch.library.impl("mfdist::fused_row_update", "CPU")
def _fused_on_cpu(
    table: Tensor,
    state: list[Tensor],
    row_ids: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    lr: Tensor,
    step: Tensor,
    *settings: Any,
) -> Tensor:
    rule, offsets, (code_stride, name) = read_settings(settings)
    if table.dtype == torch.float64:
        from mfdist.kernels.cpu_ids import checked_ids

        checked_ids(row_ids, code_stride or table.shape[0], name, is_code=code_stride > 0)
        return reference.fused_row_update(
            table, state, row_ids, scores, grad_output, float(lr), int(step), rule, offsets, code_stride
        )
    made: Tensor = implementation.on_cpu("row_update").fused_row_update(
        table, state, row_ids, scores, grad_output, float(lr), int(step), rule, offsets, code_stride, name
    )
    return made


@torch.library.impl("mfdist::fused_row_update", "CUDA")
def _fused_on_gpu(
    table: Tensor,
    state: list[Tensor],
    row_ids: Tensor,
    scores: Tensor,
    grad_output: Tensor,
    lr: Tensor,
    step: Tensor,
    *settings: Any,
) -> Tensor:
    rule, offsets, (code_stride, name) = read_settings(settings)
    made: Tensor = implementation.on_gpu("row_update").fused_row_update(
        table, state, row_ids, scores, grad_output, lr, step, rule, offsets, code_stride, name
    )
    return made


@torch.library.impl("mfdist::row_update", "CPU")
def _on_cpu(
    table: Tensor,
    state: list[Tensor],
    grads: Tensor,
    rows: Tensor | None,
    mean_squares: Tensor | None,
    lr: Tensor,
    step: Tensor,
    *settings: Any,
) -> None:
    rule, offsets, (name,) = read_settings(settings)
    if rows is not None:
        check_rows(rows, table.shape[0], name)
    if table.dtype == torch.float64:
        reference.row_update(table, state, grads, rows, mean_squares, float(lr), int(step), rule, offsets)
    else:
        implementation.on_cpu("row_update").row_update(
            table, state, grads, rows, mean_squares, float(lr), int(step), rule, offsets
        )


@torch.library.impl("mfdist::row_update", "CUDA")
def _on_gpu(
    table: Tensor,
    state: list[Tensor],
    grads: Tensor,
    rows: Tensor | None,
    mean_squares: Tensor | None,
    lr: Tensor,
    step: Tensor,
    *settings: Any,
) -> None:
    rule, offsets, (name,) = read_settings(settings)
    implementation.on_gpu("row_update").row_update(
        table, state, grads, rows, mean_squares, lr, step, rule, offsets, name
    )


@torch.library.register_fake("mfdist::fused_row_update")
def _shape_of(
    table: Tensor,
    state: list[Tensor],
    row_ids: Tensor,
    scores: Tensor,
    *rest: Any,
) -> Tensor:
    return scores.new_empty(scores.shape)


@torch.library.register_fake("mfdist::row_update")
def _no_shape(*arguments: Any) -> None:
    return None


def _counted(op: Any) -> Any:
    """Return an implementation that tells autograd of the change in place, then goes on to the device's."""

    def call(keyset: Any, table: Tensor, state: list[Tensor], *rest: Any) -> Any:
        torch.autograd.graph.increment_version([table, *state])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, table, state, *rest)

    return call


#: The registrations below live as long as it.
_library = torch.library.Library("mfdist", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _op in (("fused_row_update", fused_row_update_unchecked), ("row_update", _row_update)):
    _library.impl(_name, _counted(_op), "ADInplaceOrView", with_keyset=True)  # type: ignore[no-untyped-call]

"""What a rank checks of its own lookup before it tells the others of it."""

import torch
from torch import Tensor

from mfdist.errors import MfdistError
from mfdist.kernels.lookup_arguments import check_lookup
from mfdist.kernels.row_id_check import row_id_error
from mfdist.sharding.routes.route import LookupArguments


def refusal_of(
    lookup: LookupArguments, num_rows: int, weight: Tensor, name: str, *, must_look: bool = False
) -> MfdistError | None:
    """Return why a lookup in a table of `num_rows` rows cannot be made, or None.

    A rank that raised at once would leave the others waiting, so the error goes into the exchange as a refusal. On a
    GPU ids are looked at only where `must_look`, because it waits for the device; elsewhere the kernels check them.
    """
    row_ids, stride = lookup.row_ids, lookup.code_stride
    try:
        whole = weight.new_empty(1, weight.shape[1]).expand(num_rows, -1)  # the shape of it, without its memory
        check_lookup(whole, row_ids, lookup.scores, stride, name)
    except MfdistError as error:
        return error
    limit = stride or num_rows
    if not row_ids.numel() or (row_ids.is_cuda and not must_look) or (row_ids.dtype == torch.uint8 and limit > 255):
        return None
    low, high = (int(value) for value in torch.aminmax(row_ids))
    if low >= 0 and high < limit:
        return None
    bad = ((row_ids < 0) | (row_ids >= limit)).nonzero()[0].tolist()
    return row_id_error(int(row_ids[bad[0], bad[1]]), limit, name, is_code=stride > 0, lookup=bad[1])

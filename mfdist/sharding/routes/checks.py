"""What a rank checks of its own lookup before it tells the others of it."""

from torch import Tensor

from mfdist.errors import MfdistError
from mfdist.kernels.lookup_arguments import check_lookup
from mfdist.kernels.row_id_check import bad_id_error
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
    if row_ids.is_cuda and not must_look:
        return None
    return bad_id_error(row_ids, limit, name, is_code=stride > 0)

"""What a rank checks of its own lookup before it tells the others of it."""

from functools import lru_cache
from typing import NoReturn

import torch
from torch import Tensor

from mfdist.errors import MfdistError
from mfdist.kernels.lookup_arguments import check_lookup
from mfdist.kernels.row_id_check import bad_id_error, note_bad_id
from mfdist.sharding.exchange import Exchange
from mfdist.sharding.routes.route import LookupArguments
from mfdist.sharding.tags import Call


def refusal_of(lookup: LookupArguments, num_rows: int, weight: Tensor, name: str) -> MfdistError | None:
    """Return why a lookup in a table of `num_rows` rows cannot be made, or None.

    A rank that raised at once would leave the others waiting, so the error goes into the exchange as a refusal. On a
    GPU ids are not looked at, because it would wait for the device; the kernels check them.
    """
    refusal = shape_refusal(lookup, num_rows, weight, name)
    return refusal if refusal or lookup.row_ids.is_cuda else id_refusal(lookup, num_rows, name)


def shape_refusal(lookup: LookupArguments, num_rows: int, weight: Tensor, name: str) -> MfdistError | None:
    """Return what is wrong with a lookup whatever its ids are, or None."""
    if lookup.refusal is not None:
        return lookup.refusal
    try:
        whole = _shaped(num_rows, weight.shape[1], weight.dtype, weight.device)
        check_lookup(whole, lookup.row_ids, lookup.scores, lookup.code_stride, name)
    except MfdistError as error:
        return error
    return None


@lru_cache(maxsize=1024)
def _shaped(num_rows: int, row_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what has the shape of a table, without its memory."""
    return torch.empty(1, row_dim, dtype=dtype, device=device).expand(num_rows, -1)


def id_refusal(lookup: LookupArguments, num_rows: int, name: str) -> MfdistError | None:
    """Return the error for the first id outside the table, or None; it waits for a GPU."""
    stride = lookup.code_stride
    return bad_id_error(lookup.row_ids, stride or num_rows, name, is_code=stride > 0)


def note_ids(lookup: LookupArguments, num_rows: int, name: str) -> None:
    """Have a bad id reported as a kernel would, on a rank of a GPU that holds no part of the table and launches none.

    On a CPU whoever asked has refused.
    """
    if lookup.row_ids.is_cuda:
        stride = lookup.code_stride
        note_bad_id(lookup.row_ids, stride or num_rows, name, is_code=stride > 0)


def refuse(exchange: Exchange, call: Call, refusal: MfdistError | None) -> NoReturn:
    """Tell the other ranks that this one cannot make a lookup, and raise the refusal."""
    exchange.open(call, refusal=refusal).wait()
    assert refusal is not None
    raise refusal

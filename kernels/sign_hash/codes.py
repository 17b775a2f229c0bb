"""What codes are stored in."""

import torch


def code_dtype(bits: int) -> torch.dtype:
    """Return the narrowest of the dtypes that lookups take which holds a code of so many bits."""
    return torch.uint8 if bits <= 8 else torch.uint16 if bits <= 16 else torch.int32

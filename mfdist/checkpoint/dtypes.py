"""How torch's dtypes are stored: under their own name where zarr has it, else as unsigned integers of the same bits."""

import torch

#: dtype by its name in an array's attributes → the dtype zarr stores it as.
STORED_DTYPES: dict[str, torch.dtype] = {
    **{
        name: getattr(torch, name)
        for name in (
            *("float64", "float32", "float16", "complex128", "complex64", "bool"),
            *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
        )
    },
    "bfloat16": torch.uint16,
    "float8_e4m3fn": torch.uint8,
    "float8_e5m2": torch.uint8,
    "float8_e4m3fnuz": torch.uint8,
    "float8_e5m2fnuz": torch.uint8,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")

"""The lookups that are measured: shapes of MemoryFormer's layers and of one large table, and their random tensors."""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: Exponent of Zipf's law in the skewed cases: the share of the row of rank r is about 1 / r^1.2.
_ZIPF = 1.2
#: Rows that fewer tokens than these read are read again by the next call; a GPU's calls then take turns at others.
_FEW_TOKENS = 64
_CACHE_BYTES = 128 << 20
_MAX_VARIANTS = 512

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BYTES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class LookupCase:
    """A lookup's shape: N tokens, K lookups a token, each with a table of R rows, or one for all; rows D wide."""

    num_tokens: int
    num_lookups: int
    rows_each: int
    row_dim: int
    is_shared: bool = False
    is_skewed: bool = False
    #: Types of the rows, by their names in `FLOATS` and `BYTES`.
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    #: Whether gradients and updates are measured too; a few tokens never are.
    is_trained: bool = True

    @property
    def num_rows(self) -> int:
        """Return the rows of all lookups."""
        return self.rows_each if self.is_shared else self.num_lookups * self.rows_each

    @property
    def code_stride(self) -> int:
        """Return the rows a lookup owns, or 0 where ids may be any row."""
        return 0 if self.is_shared else self.rows_each

    @property
    def has_backward(self) -> bool:
        """Return whether gradients and updates are measured."""
        return self.is_trained and self.num_tokens >= _FEW_TOKENS

    @property
    def num_elements(self) -> int:
        """Return N·K·D, the elements of the rows that are looked up."""
        return self.num_tokens * self.num_lookups * self.row_dim


_ALL = ("fp32", "bf16", "int8", "fp8")
_BASE_QKV, _BASE_FFN2, _TINY_QKV = (16384, 128, 256, 1024), (16384, 128, 1024, 1024), (32768, 64, 256, 512)
_PKM = (16384, 128, 1 << 20, 1024)
CASES: dict[str, dict[str, LookupCase]] = {
    "cuda": {
        "base-qkv": LookupCase(*_BASE_QKV, dtypes=_ALL),
        "base-ffn2": LookupCase(*_BASE_FFN2, dtypes=_ALL),
        "tiny-qkv": LookupCase(*_TINY_QKV, dtypes=_ALL),
        # The other lookups of a block: three projections in one, 3·d wide, and the feed-forward's.
        "base-qkv-3d": LookupCase(16384, 128, 256, 3072, dtypes=("bf16",)),
        "base-ffn1": LookupCase(16384, 128, 256, 1280, dtypes=("bf16",)),
        "tiny-qkv-3d": LookupCase(32768, 64, 256, 1536, dtypes=("bf16",)),
        "tiny-ffn1": LookupCase(32768, 64, 256, 640, dtypes=("bf16",)),
        "tiny-ffn2": LookupCase(32768, 64, 1024, 512, dtypes=("bf16",)),
        "big-tau16": LookupCase(16384, 128, 65536, 1024, dtypes=("bf16",)),
        "pkm-1M": LookupCase(*_PKM, is_shared=True, dtypes=_ALL),
        "base-qkv-zipf": LookupCase(*_BASE_QKV, is_skewed=True, dtypes=("bf16",)),
        "base-ffn2-zipf": LookupCase(*_BASE_FFN2, is_skewed=True, dtypes=("bf16",)),
        "tiny-qkv-zipf": LookupCase(*_TINY_QKV, is_skewed=True, dtypes=("bf16",)),
        "pkm-1M-zipf": LookupCase(*_PKM, is_shared=True, is_skewed=True, dtypes=("bf16",)),
        "base-decode": LookupCase(1, 128, 256, 1024, dtypes=("bf16", "int8", "fp8")),
        "base-decode-8": LookupCase(8, 128, 256, 1024, dtypes=("bf16", "int8", "fp8")),
        "4k-decode": LookupCase(1, 512, 256, 4096, dtypes=("bf16", "int8", "fp8")),
        "4k-decode-8": LookupCase(8, 512, 256, 4096, dtypes=("bf16", "int8", "fp8")),
    },
    "cpu": {
        "tiny-train": LookupCase(4096, 64, 256, 512, dtypes=_ALL),
        "base-train": LookupCase(2048, 128, 256, 1024, dtypes=_ALL),
        "base-ffn2": LookupCase(2048, 128, 1024, 1024, dtypes=_ALL),
        "big": LookupCase(2048, 128, 8192, 1024, is_trained=False),  # checking them would take minutes
        "base-train-zipf": LookupCase(2048, 128, 256, 1024, is_skewed=True),
        "demo-qkv": LookupCase(4096, 16, 256, 384),
        "demo-ffn1": LookupCase(4096, 16, 256, 160),
        "demo-ffn2": LookupCase(4096, 16, 1024, 128),
        "base-decode": LookupCase(1, 128, 256, 1024, dtypes=_ALL),
        "base-decode-16": LookupCase(16, 128, 256, 1024),
        "4k-decode": LookupCase(1, 512, 256, 4096, dtypes=_ALL),
        "4k-decode-16": LookupCase(16, 512, 256, 4096),
    },
}


@dataclass
class LookupTensors:
    """Random tensors of a case, each made when it is first asked for; the same for the same seed."""

    case: LookupCase
    device: str
    seed: int = 0
    _tables: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def table(self, dtype: torch.dtype) -> Tensor:
        """Return the table [rows, D] in a floating dtype."""
        if dtype not in self._tables:
            shape = (self.case.num_rows, self.case.row_dim)
            self._tables[dtype] = torch.randn(shape, dtype=dtype, device=self.device, generator=self._generator(1))
        return self._tables[dtype]

    @functools.cached_property
    def row_ids(self) -> list[Tensor]:
        """Return ids [N, K] for several calls: uint8 or uint16 codes, or int64 rows of a shared table."""
        case = self.case
        dtype = torch.int64 if case.is_shared else torch.uint8 if case.rows_each <= 256 else torch.uint16
        generator = self._generator(2)
        shape = (self.num_variants, case.num_tokens, case.num_lookups)
        if not case.is_skewed:
            ids = torch.randint(0, case.rows_each, shape, device=self.device, generator=generator)
        else:
            ranks = torch.arange(1, case.rows_each + 1, dtype=torch.float64, device=self.device)
            bounds = (ranks**-_ZIPF).cumsum(0)
            drawn = torch.rand(shape, dtype=torch.float64, device=self.device, generator=generator) * bounds[-1]
            # Frequent rows lie anywhere, not side by side.
            order = torch.randperm(case.rows_each, device=self.device, generator=generator)
            ids = order[torch.searchsorted(bounds, drawn).clamp_max_(case.rows_each - 1)]
        return list(ids.to(dtype).unbind())

    @functools.cached_property
    def scores(self) -> Tensor:
        """Return scores [N, K]."""
        shape = (self.case.num_tokens, self.case.num_lookups)
        return torch.rand(shape, device=self.device, generator=self._generator(3))

    def grad_output(self, dtype: torch.dtype) -> Tensor:
        """Return a gradient of the output [N, D]."""
        shape = (self.case.num_tokens, self.case.row_dim)
        return torch.randn(shape, device=self.device, generator=self._generator(4)).to(dtype)

    @property
    def num_variants(self) -> int:
        """Return how many calls there are ids for: on a GPU, for few tokens, so many that its cache holds none."""
        if self.device == "cpu" or self.case.num_tokens >= _FEW_TOKENS:
            return 1
        return num_variants(2 * self.case.num_elements)

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(16 * self.seed + stream)


def num_variants(call_bytes: int) -> int:
    """Return how many different inputs of that size go beyond a GPU's cache."""
    return min(_MAX_VARIANTS, max(1, -(-_CACHE_BYTES // call_bytes)))

"""The lookup: out[n] = Σ_k score[n, k] · row[id[n, k]]."""

from mfdist.kernels.gather_sum.op import gather_sum

__all__ = ["gather_sum"]

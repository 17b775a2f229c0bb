"""Forward-mode differentiation, which no operator has: torch would drop the tangent and give 0 without a word."""

from torch import Tensor
from torch.autograd import forward_ad


def refuse_tangents(operator: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError where a tensor carries a tangent, as under torch.func.jvp.

    Cost: one comparison outside of forward-mode differentiation.
    """
    if getattr(forward_ad, "_current_level", 0) < 0:  # else each tensor is asked, which takes two microseconds
        return
    if any(tensor is not None and _has_tangent(tensor) for tensor in tensors):
        raise NotImplementedError(
            f"{operator} is differentiated by backward alone; got a tangent of forward mode (jvp, jacfwd, make_dual); "
            "use torch.autograd.grad or torch.autograd.functional.jacobian"
        )


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]

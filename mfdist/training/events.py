"""What a training run tells whoever watches it: plain frozen values, in the order they happen.

The loop calls one observer, `Observer`, with each event, on rank 0, in the training thread; the terminal display, the
quiet line mode and the metrics file are observers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mfdist.training.layer_use import LayerUse


@dataclass(frozen=True, kw_only=True)
class Preparing:
    """Work before training goes on: reading text, training the tokeniser, tokenising."""

    activity: str  # a phrase in the present tense, such as "tokenising"
    done: float
    total: float | None  # None while the end is unknown
    unit: str  # "bytes", "documents", …


@dataclass(frozen=True, kw_only=True)
class Started:
    """The model is built and the first batch is about to be read."""

    run_dir: Path
    name: str
    kind: str  # "memory" or "dense"
    device: str
    first_step: int  # 0, or the step of the checkpoint that is continued
    last_step: int
    num_table_parameters: int
    num_dense_parameters: int
    num_train_tokens: int
    tokens_per_step: int
    baselines_bits_per_byte: dict[str, float]  # name → bits per byte on the validation text
    device_type: str = ""  # "cpu" or "cuda"
    num_ranks: int = 1
    num_hosts: int = 1


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """One optimiser step is done; `step` counts finished steps."""

    step: int
    loss: float  # nats a token, mean over the step's batch
    dense_lr: float
    table_lr: float
    dense_grad_norm: float
    table_grad_norm: float | None  # None where tables are fused, whose gradients are never there together
    tokens_per_s: float
    step_s: float
    peak_memory_bytes: int  # device memory on a GPU, resident memory on a CPU
    lookup_share: float | None  # share of the step spent in sign_hash, gather_sum and their gradients, where measured
    time_shares: dict[str, float] | None = None  # shares of the step by kind of operator, where measured


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The model was scored on held-out text."""

    step: int
    loss: float  # nats a token
    bits_per_byte: float
    num_tokens: int
    is_final: bool  # over the whole validation set
    elapsed_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Diagnosed:
    """It was counted how a validation's tokens spread over the tables' rows."""

    step: int
    num_tokens: int  # counted, of all ranks
    layers: "tuple[LayerUse, ...]"  # in the model's order
    elapsed_s: float  # beside the validation itself


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint is committed; in the background, so perhaps some steps after the one it holds."""

    step: int
    path: Path | str  # an URL is text
    num_bytes: int
    save_s: float  # from the copy's beginning to the commit
    written_bytes: int = 0  # the rest are files shared with the checkpoint before
    stall_s: float = 0.0  # how long training waited


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The model wrote text after its last step."""

    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class TwinTimed:
    """The dense twin was trained for a few steps on the same batches to compare speed."""

    tokens_per_s: float
    model_tokens_per_s: float
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something deserves attention but training goes on."""

    message: str


@dataclass(frozen=True, kw_only=True)
class Noted:
    """Something happened around training that is as it should be, such as trainers that hand over to others."""

    message: str


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Training ended by an error; everything up to the last checkpoint is committed."""

    kind: str  # of the error, see mfdist.errors
    message: str


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The run is over for now; everything up to `step` is committed, if anything is."""

    run_dir: Path
    step: int
    last_step: int
    reason: str  # "finished" or the name of the signal
    elapsed_s: float
    is_saved: bool = True  # not with checkpoint.every = 0


Event = (
    Preparing
    | Started
    | Stepped
    | Evaluated
    | Diagnosed
    | Saved
    | Sampled
    | TwinTimed
    | Warned
    | Noted
    | Failed
    | Stopped
)
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Observe nothing."""

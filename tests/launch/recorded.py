"""The events of one short run, as the loop tells them; displays are tested on them."""

from pathlib import Path

from mfdist.training.events import (
    Evaluated,
    Event,
    Preparing,
    Sampled,
    Saved,
    Started,
    Stepped,
    Stopped,
    TwinTimed,
    Warned,
)

RUN_DIR = Path("/tmp/a folder with blanks/runs/demo")


def started(*, first_step: int = 0, last_step: int = 400) -> Started:
    """Return the event at the start of a MemoryFormer's training."""
    return Started(
        run_dir=RUN_DIR,
        name="demo",
        kind="memory",
        device="CPU, 2 threads",
        first_step=first_step,
        last_step=last_step,
        num_table_parameters=17_301_504,
        num_dense_parameters=1_054_336,
        num_train_tokens=3_141_592,
        tokens_per_step=4096,
        baselines_bits_per_byte={"byte unigram": 4.612, "order-2 n-gram": 2.871},
    )


def stepped(step: int, *, loss: float = 3.21, lookup_share: float | None = 0.41) -> Stepped:
    """Return the event after one step of half a second."""
    return Stepped(
        step=step,
        loss=loss,
        dense_lr=4e-3,
        table_lr=12e-3,
        dense_grad_norm=0.7,
        table_grad_norm=0.3,
        tokens_per_s=8192.0,
        step_s=0.5,
        peak_memory_bytes=1_288_490_188,
        lookup_share=lookup_share,
    )


def evaluated(step: int, *, bits_per_byte: float = 2.104, is_final: bool = False) -> Evaluated:
    """Return the event after a validation."""
    return Evaluated(step=step, loss=4.2, bits_per_byte=bits_per_byte, num_tokens=8192, is_final=is_final)


def saved(step: int) -> Saved:
    """Return the event after a checkpoint."""
    path = RUN_DIR / "checkpoints" / f"step-{step:09d}"
    return Saved(step=step, path=path, num_bytes=220_000_000, save_s=0.43)


def stopped(step: int = 400, *, reason: str = "finished") -> Stopped:
    """Return the event at the end."""
    return Stopped(run_dir=RUN_DIR, step=step, last_step=400, reason=reason, elapsed_s=215.0)


def whole_run() -> list[Event]:
    """Return a run from its first to its last event."""
    return [
        Preparing(activity="tokenising", done=0, total=11_000_000, unit="bytes"),
        Preparing(activity="tokenising", done=5_500_000, total=11_000_000, unit="bytes"),
        Preparing(activity="tokenising", done=11_000_000, total=11_000_000, unit="bytes"),
        Warned(message="notes.txt is not text; skipped"),
        started(),
        *(stepped(step, lookup_share=0.41 if step == 1 else None) for step in range(1, 101)),
        evaluated(100),
        saved(100),
        *(stepped(step, loss=2.5, lookup_share=None) for step in range(101, 401)),
        saved(400),
        evaluated(400, bits_per_byte=1.987, is_final=True),
        Sampled(prompt="def ", text="main(self):\n    return [x for x in self]\x1b[31m red\n"),
        TwinTimed(tokens_per_s=12_000.0, model_tokens_per_s=8_192.0, num_steps=10),
        stopped(),
    ]

"""A set of steps, most of which follow one another, in little room."""

from bisect import bisect_left, insort


class StepSet:
    """Steps as runs [first, last]; a client that counts takes up one run."""

    def __init__(self) -> None:
        self._runs: list[list[int]] = []

    def add(self, step: int) -> bool:
        """Add a step; return whether it is new."""
        if self._runs and step == self._runs[-1][1] + 1:
            self._runs[-1][1] = step
            return True
        before = bisect_left(self._runs, [step + 1]) - 1
        if before >= 0 and step <= self._runs[before][1]:
            return False
        insort(self._runs, [step, step])
        return True

    def forget(self, through: int) -> None:
        """Take out all steps up to this one."""
        self._runs = [[max(first, through + 1), last] for first, last in self._runs if last > through]

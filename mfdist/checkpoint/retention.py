"""Which committed steps are kept."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mfdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The latest `keep_last` steps, and every step that `keep_every` divides.

    Raises:
        ConfigError: the latest step would not be kept, or `keep_every` is negative.
    """

    keep_last: int
    keep_every: int = 0  # 0: no others

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(f"keep_last must be at least 1; got {self.keep_last}; delete the directory to keep none.")
        if self.keep_every < 0:
            raise ConfigError(f"keep_every must be 0 or more steps; got {self.keep_every}; 0 keeps no others.")

    def outdated(self, steps: Iterable[int], is_sound: Callable[[int], bool] = lambda step: True) -> list[int]:
        """Return those of `steps` that need not be kept, ascending.

        Args:
            steps: all there are.
            is_sound: whether a step counts as one of the latest; asked from the last one on, until there are enough.
        """
        ascending = sorted(steps)
        if len(ascending) <= self.keep_last:
            return []
        num_sound = 0
        for index in reversed(range(len(ascending))):
            num_sound += is_sound(ascending[index])
            if num_sound == self.keep_last:
                return [step for step in ascending[:index] if self.keep_every == 0 or step % self.keep_every != 0]
        return []

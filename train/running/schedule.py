"""Learning rates over the run, and when to worry or to stop. Plain numbers: no torch."""

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from boxcar.schemas.training import EarlyStopConfig, LearningRateConfig, LossWatchConfig


def rate_factor(step: int, num_steps: int, config: "LearningRateConfig") -> float:
    """Factor of the peak rate for step number `step` (from 0) of `num_steps`: linear warm-up, then cosine, linear or constant."""
    warmup = math.ceil(config.warmup * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, num_steps - warmup)
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.final + (1 - config.final) * left


@dataclass
class Average:
    """Moving average of one difficulty bin, and how long it has been high."""

    value: float | None = None
    minimum: float = math.inf
    high_for: int = 0
    last_low_step: int = 0


@dataclass
class LossWatch:
    """Notices a loss that falls and then rises. Per difficulty bin: a curriculum alone makes the overall loss rise."""

    bins: dict[str, Average] = field(default_factory=dict)

    @classmethod
    def of(cls, state: dict[str, Any]) -> "LossWatch":
        return cls({name: Average(**values) for name, values in state.items()})

    def state(self) -> dict[str, Any]:
        return {name: asdict(average) for name, average in self.bins.items()}

    def see(self, step: int, losses: dict[str, float], config: "LossWatchConfig") -> tuple[str, int] | None:
        """Losses of this step by bin. Returns (bin, last step before the rise) where one has been high for `config.steps` steps."""
        risen = None
        for name, loss in losses.items():
            average = self.bins.setdefault(name, Average())
            average.value = loss if average.value is None else config.smoothing * average.value + (1 - config.smoothing) * loss
            average.minimum = min(average.minimum, average.value)
            if average.value <= config.factor * average.minimum:
                average.high_for, average.last_low_step = 0, step
                continue
            average.high_for += 1
            if average.high_for == config.steps and risen is None:
                risen = (name, average.last_low_step)
        return risen


@dataclass
class EarlyStop:
    """Best value of a validation metric and how many validations did not beat it."""

    best: float | None = None
    waited: int = 0

    def see(self, value: float, config: "EarlyStopConfig") -> bool:
        """True where it is time to stop."""
        gain = math.inf if self.best is None else (self.best - value if config.mode == "min" else value - self.best)
        if gain > config.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= config.patience

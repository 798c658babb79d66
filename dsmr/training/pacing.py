"""How far a training run is, and when it is time to validate, to save and to end: by steps, or by the clock."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from dsmr.console.schema import Amount, Maybe, Natural
from dsmr.runs.settings import EVALUATION_SHARE, EVALUATION_SPEED, TrainConfig

KEPT = {
    "step": Natural,
    "speed": Maybe(Amount),
    "validated": Natural,
    "validated_at": Amount,
    "validation_seconds": Maybe(Amount),
}
"""What a checkpoint keeps, besides the seconds."""
PACE = {"seconds": Amount, **KEPT}
"""`Pace.state_dict`."""


class Pace:
    """Counts the steps and seconds of a run, over all its parts where it was stopped and resumed.

    Without `minutes` in the settings, nothing but `save_due` looks at the clock: the same run validates at the same
    steps with the same learning rates, however fast it is. Processes that train together decide alike where they have
    the same `clock` (seconds).
    """

    def __init__(
        self,
        config: TrainConfig,
        total_steps: int | None,
        validation_tokens: int,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.config, self.total_steps, self.validation_tokens = config, total_steps, validation_tokens
        self.evaluations = config.evaluations(total_steps, validation_tokens)
        self.step = 0
        self.speed: float | None = None  # tokens a second, lately
        self.validated, self.validated_at = 0, 0.0  # step and seconds of the run at the latest validation
        self.validation_seconds: float | None = None  # how long it took
        self._seconds_before, self._steps_before = 0.0, 0
        self.clock = clock or time.monotonic
        self.start()

    def start(self) -> None:
        """Begin to count the seconds; what came before, such as loading, does not count."""
        self._started = self._saved_at = self.clock()

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"seconds": self.seconds, **{name: getattr(self, name) for name in KEPT}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from `state`."""
        for name in KEPT:
            setattr(self, name, state[name])
        self._seconds_before, self._steps_before = float(state["seconds"]), self.step
        self.start()

    @property
    def seconds(self) -> float:
        """Seconds of the run so far."""
        return self._seconds_before + self.clock() - self._started

    @property
    def share(self) -> float:
        """The part of the run that lies behind, 0 to 1."""
        return self._share_at(self.step, self.seconds)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end, if the run goes on as it went; None before it has begun."""
        share = self.share
        return self.seconds * (1 - share) / share if share > 0 else None

    def _share_at(self, step: int, seconds: float) -> float:
        shares = [step / self.total_steps] if self.total_steps is not None else []
        if self.config.minutes is not None:
            whole = max(60 * self.config.minutes, 1e-9)  # numbers close to zero count as zero in a training
            shares.append(seconds / (whole - min(self._validation_cost(), whole / 2)))  # the last one belongs to it
        return min(1.0, max(shares))

    def _validation_cost(self) -> float:
        """Seconds that a validation takes: as long as the latest, or what the speed of training suggests."""
        if self.validation_seconds is not None:
            return self.validation_seconds
        return self.validation_tokens / (EVALUATION_SPEED * self.speed) if self.speed else 0.0

    def trained(self, tokens: int, seconds: float) -> float:
        """Count a step that took `seconds` for `tokens`; return its tokens a second."""
        self.step += 1
        speed = tokens / max(seconds, 1e-9)
        # A process's first step is slow, because it loads and allocates; it says nothing about the others.
        fresh = self.speed is None or self.step - self._steps_before <= 2
        self.speed = speed if fresh or self.speed is None else 0.9 * self.speed + 0.1 * speed
        return speed

    def validation_done(self, begun: float) -> None:
        """Note that a validation that began at second `begun` of the run has ended."""
        self.validated, self.validated_at = self.step, self.seconds
        self.validation_seconds = self.validated_at - begun

    def saved(self) -> None:
        """Note that a checkpoint has been written."""
        self._saved_at = self.clock()

    @property
    def validation_due(self) -> bool:
        """At the end; else every `eval_every` steps, or `evaluations` times a run."""
        if self.step == self.validated:
            return False
        share = self.share
        if share >= 1:
            return True
        if self.config.eval_every is not None:
            return self.step // self.config.eval_every > self.validated // self.config.eval_every
        before = self._share_at(self.validated, self.validated_at)
        if int(share * self.evaluations) <= int(before * self.evaluations):
            return False
        worth = self._validation_cost() * (1 / EVALUATION_SHARE - 1)
        return self.config.minutes is None or self.seconds - self.validated_at >= worth

    @property
    def save_due(self) -> bool:
        """Every `save_every` steps, and `save_minutes` after the latest checkpoint."""
        if self.config.save_every is not None and self.step % self.config.save_every == 0:
            return True
        return self.clock() - self._saved_at >= 60 * self.config.save_minutes

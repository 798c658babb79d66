"""When a run validates and ends follows from its steps alone, unless it is given minutes."""

import pytest

from dsmr.runs.settings import TrainConfig
from dsmr.training import pacing
from dsmr.training.pacing import Pace
from dsmr_kernels.denormals import WithoutDenormals


class Clock:
    """A clock that is moved by hand."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    return clock


def run(pace: Pace, clock: Clock, step_seconds: float, validation_seconds: float) -> tuple[list[int], float]:
    """Go through a whole run; return the steps that were validated, and the seconds that it took."""
    validated = []
    while True:
        if pace.validation_due:
            begun = pace.seconds
            clock.now += validation_seconds
            pace.validation_done(begun)
            validated.append(pace.step)
        if pace.share >= 1:
            return validated, pace.seconds
        clock.now += step_seconds
        pace.trained(1000, step_seconds)


def config(**more) -> TrainConfig:
    return TrainConfig("data", "out", batch_size=1, segment_length=1000, **more)


@pytest.mark.parametrize("step_seconds", [0.01, 7.0])
def test_without_minutes_the_clock_does_not_matter(clock: Clock, step_seconds: float) -> None:
    assert run(Pace(config(steps=100), 100, 6000), clock, step_seconds, 3.0)[0] == [20, 40, 60, 80, 100]
    assert run(Pace(config(steps=100, eval_every=30), 100, 6000), clock, step_seconds, 3.0)[0] == [30, 60, 90, 100]


@pytest.mark.parametrize("minutes", [1e-320, 5e-324, 1e-12])
def test_next_to_no_minutes_are_over_at_once(clock: Clock, minutes: float) -> None:
    """In a training numbers below the least normal one are zero."""
    pace = Pace(config(minutes=minutes), None, 0)
    clock.now += 1.0
    with WithoutDenormals():
        assert pace.share == 1.0


@pytest.mark.parametrize("validation_seconds", [0.1, 2.0, 20.0, 50.0])
def test_a_run_of_minutes_ends_in_time_with_few_validations(clock: Clock, validation_seconds: float) -> None:
    """The last validation belongs to the minutes, as far as its length can be foreseen."""
    tokens = round(validation_seconds * 3 * 1000)  # as expected: three times as fast as training
    validated, seconds = run(Pace(config(minutes=2), None, tokens), clock, 1.0, validation_seconds)
    assert 119 <= seconds <= 122
    assert len(validated) <= 21
    assert len(validated) * validation_seconds <= 0.1 * 120 + 2 * validation_seconds
    assert validated[-1] >= 60


def test_a_resumed_run_goes_on_counting(clock: Clock) -> None:
    first = Pace(config(steps=10), 10, 600)
    clock.now += 5
    first.trained(1000, 5.0)
    state = first.state_dict()
    clock.now += 1000
    second = Pace(config(steps=10), 10, 600)
    second.load_state_dict(state)
    clock.now += 2
    assert second.seconds == pytest.approx(7)
    assert (second.step, second.share) == (1, 0.1)
    assert second.seconds_left == pytest.approx(63)


def test_checkpoints_come_by_steps_and_by_the_clock(clock: Clock) -> None:
    pace = Pace(config(steps=100, save_every=3, save_minutes=1), 100, 0)
    due = []
    for _ in range(9):
        clock.now += 1
        pace.trained(1000, 1.0)
        due.append(pace.save_due)
    assert due == [False, False, True] * 3
    pace.saved()
    clock.now += 61
    pace.trained(1000, 61.0)
    assert pace.save_due

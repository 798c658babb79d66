"""Play in real time: a model's music through a MIDI port as it is made, a little ahead of the moment it sounds.

The model makes music in the calling thread, a thread of its own sends each event when its moment has come, and between
them lies a small look-ahead. Where the model falls behind, the music waits for it, nothing is left out, and the
under-run is counted. Whatever ends the playing, every note that sounds is ended. `dsmr.live.ports` opens the ports.
"""

from __future__ import annotations

import contextlib
import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from dsmr.console.errors import UserError
from dsmr.console.stopping import graceful_stop
from dsmr.generation.player import Limits, Player
from dsmr.generation.recorder import Recorder
from dsmr.music.sounding import OFF, ON, PEDAL, SUSTAIN, Event, Sounding

UNNOTICED = 0.01  # seconds by which music may be late before it counts as an under-run


class Port(Protocol):
    """Where events go: `dsmr.live.ports.OutputPort`, or a list with a `send` for tests."""

    def send(self, event: Event) -> None:
        """Send at once; `UserError` if the port does not take it."""


class Schedule:
    """Which events are due when. Music time is in seconds of the piece, `now` in seconds of any steady clock."""

    def __init__(self, begin: float) -> None:
        self.known = begin  # up to here nothing more will come
        self.under_runs = 0
        self.complete = False
        self._origin: float | None = None  # the clock's time at second 0 of the piece; None = not begun
        self._ahead: list[Event] = []

    def push(self, events: Iterable[Event], known: float, now: float) -> None:
        """Take in events; none that comes later lies before `known`. Makes the music wait if it has run dry."""
        late = self.place(now) - self.known
        if self._origin is not None and late > UNNOTICED:
            self.under_runs += 1
            self._origin += late
        for event in events:
            heapq.heappush(self._ahead, event)
        self.known = max(self.known, known)

    def start(self, now: float) -> None:
        """The next moment of the music is `now`."""
        if self._origin is None:
            self._origin = now - (self._ahead[0].at if self._ahead else self.known)

    def place(self, now: float) -> float:
        """The second of the piece that sounds `now`; before the start, minus infinity."""
        return -float("inf") if self._origin is None else now - self._origin

    def due(self, now: float) -> list[Event]:
        """Take out the events whose moment has come. Up to `known` only: what lies beyond may still be preceded."""
        until = self.place(now) if self.complete else min(self.place(now), self.known)
        events = []
        while self._ahead and self._ahead[0].at <= until:
            events.append(heapq.heappop(self._ahead))
        return events

    def wait(self, now: float) -> float | None:
        """Seconds until the next event is due; None if there is none yet."""
        if self._origin is None or not self._ahead:
            return None
        if not self.complete and self._ahead[0].at > self.known:
            return None
        return max(0.0, self._ahead[0].at - self.place(now))

    @property
    def empty(self) -> bool:
        return not self._ahead


class Outlet:
    """A context manager with the thread that sends what a `Schedule` says is due; ends what sounds when it is left."""

    def __init__(self, port: Port, begin: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.port, self.clock, self.schedule = port, clock, Schedule(begin)
        self.failure: Exception | None = None
        self.sounding: Counter[int] = Counter()
        self._pedal = False
        self._changed = threading.Condition()
        self._leave = False
        self._thread = threading.Thread(target=self._run, name="dsmr-midi", daemon=True)

    def __enter__(self) -> Outlet:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._leave = True
            self._changed.notify_all()
        self._thread.join()
        if self.failure is None:
            self._silence()

    def push(self, events: Iterable[Event], known: float) -> None:
        """Hand over events, see `Schedule.push`; raises what the port raised."""
        with self._changed:
            self.schedule.push(events, known, self.clock())
            self._changed.notify_all()
            self._check()

    def start(self) -> None:
        """Begin to sound, if it does not yet."""
        with self._changed:
            self.schedule.start(self.clock())
            self._changed.notify_all()

    def ahead(self) -> float:
        """Seconds of music that are made and have not sounded yet."""
        with self._changed:
            self._check()
            return self.schedule.known - self.schedule.place(self.clock())

    def finish(self, stopped: Callable[[], bool]) -> None:
        """Nothing more will come: wait until all has sounded, or until `stopped()`."""
        self.start()
        with self._changed:
            self.schedule.complete = True
            self._changed.notify_all()
            while not self.schedule.empty and not stopped() and self.failure is None:
                self._changed.wait(0.05)
            self._check()

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        with self._changed:
            while not self._leave:
                try:
                    for event in self.schedule.due(self.clock()):
                        self._send(event)
                except Exception as error:  # whatever a port's library raises ends the playing, not this thread alone
                    self.failure = error
                    self._changed.notify_all()
                    return
                self._changed.notify_all()
                self._changed.wait(self.schedule.wait(self.clock()))

    def _send(self, event: Event) -> None:
        """Send, and know what sounds. A pitch struck again is ended first; its earlier end then comes to nothing."""
        if event.kind == OFF:
            if not self.sounding[event.pitch]:
                return
            self.sounding[event.pitch] -= 1
            if self.sounding[event.pitch] > 0:
                return
            del self.sounding[event.pitch]
        elif event.kind == ON:
            if self.sounding[event.pitch] > 0:
                self.port.send(Event(event.at, OFF, event.pitch))
            self.sounding[event.pitch] += 1
        else:
            self._pedal = event.velocity > 0
        self.port.send(event)

    def _silence(self) -> None:
        for pitch in sorted(self.sounding):
            self.port.send(Event(0.0, OFF, pitch))
        self.sounding.clear()
        if self._pedal:
            self.port.send(Event(0.0, PEDAL, SUSTAIN, 0))


@dataclass(frozen=True)
class Performance:
    """How the playing went."""

    tokens: int
    notes: int
    seconds: float
    under_runs: int
    signal: int | None = None  # the number of the one that ended it: Ctrl-C, SIGTERM, SIGHUP
    unrecorded: UserError | None = None  # why the recorder's file is not whole

    @property
    def interrupted(self) -> bool:
        return self.signal is not None


def perform(
    player: Player,
    port: Port,
    limits: Limits,
    *,
    max_tokens: int | None = None,
    stop_at_end: bool = False,
    look_ahead: float = 0.5,
    recorder: Recorder | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Performance:
    """Play `player`'s single stream through `port` as fast as it sounds.

    Args:
        look_ahead: seconds of music that are made before they sound; what the model may fall behind unnoticed.
        recorder: keeps what is played in a MIDI file.
        on_event: told of every event as it is made.

    A recording that cannot be written does not end the playing: it is tried again, and at last told.

    Raises `UserError` if the port or the model fails; what was played until then is in the recorder's file.
    """
    if not look_ahead > 0:
        raise UserError(f"look-ahead must be more than 0 seconds, got {look_ahead:g}")
    assert player.vocabulary is not None
    sounding = Sounding(player.vocabulary)
    for token in player.tokens[0]:
        sounding.push(token)
    for pitch in list(sounding.open):  # notes of the prompt that no token has ended were never sent
        del sounding.open[pitch]
    began = sounding.clock.seconds
    tokens = notes = 0
    try:
        with graceful_stop() as stop, Outlet(port, began) as outlet:

            def stopped() -> bool:
                return stop.signal is not None

            for token in _tokens(player.play(max_tokens, limits, stop_at_end)):
                events = sounding.push(token)
                tokens += 1
                notes += sum(event.kind == ON for event in events)
                if recorder is not None:
                    recorder.add([_later(event, -began) for event in events], sounding.clock.seconds - began)
                    if notes:
                        with contextlib.suppress(UserError):
                            recorder.save()
                for event in events:
                    if on_event is not None:
                        on_event(event)
                outlet.push(events, sounding.clock.seconds)
                if sounding.clock.seconds - began >= look_ahead:
                    outlet.start()
                while not stopped() and look_ahead < outlet.ahead() < float("inf"):
                    time.sleep(0.005)
                if stopped():
                    break
            else:
                outlet.push(sounding.release(sounding.clock.seconds), sounding.clock.seconds)
                outlet.finish(stopped)
        unrecorded = _keep(recorder if notes else None)
    except BaseException as error:
        if (unrecorded := _keep(recorder if notes else None)) is not None and isinstance(error, Exception):
            raise UserError(f"{error}; {unrecorded}") from error
        raise
    seconds = sounding.clock.seconds - began
    return Performance(tokens, notes, seconds, outlet.schedule.under_runs, stop.signal, unrecorded)


def _keep(recorder: Recorder | None) -> UserError | None:
    """Write the recording to its end; why it could not be, if so."""
    try:
        if recorder is not None:
            recorder.save(force=True)
    except UserError as error:
        return error
    return None


def _tokens(playing: Iterator[list[int | None]]) -> Iterator[int]:
    for (token,) in playing:
        assert token is not None
        yield token


def _later(event: Event, seconds: float) -> Event:
    return Event(event.at + seconds, event.kind, event.pitch, event.velocity, event.seconds)

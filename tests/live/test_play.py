"""Real time: events go out in order and on time, under-runs are counted, and nothing is left sounding."""

import itertools
import os
import signal
import sys
import threading
import time
from types import ModuleType

import pytest
import torch

from dsmr.console.errors import UserError
from dsmr.generation.player import Limits, Player
from dsmr.generation.recorder import Recorder
from dsmr.generation.sampling import Sampling
from dsmr.live.play import Outlet, Schedule, perform
from dsmr.model.config import DSMRConfig
from dsmr.model.transformer import DSMRModel
from dsmr.music.sounding import OFF, ON, PEDAL, SUSTAIN, Event


def note(at: float, pitch: int, seconds: float = 0.1) -> list[Event]:
    return [Event(at, ON, pitch, 64, seconds), Event(at + seconds, OFF, pitch)]


class MemoryPort:
    """Keeps what is sent and when. Fails from message number `breaks_at` on."""

    name = "memory"

    def __init__(self, breaks_at: int | None = None) -> None:
        self.sent: list[tuple[float, Event]] = []
        self.breaks_at = breaks_at
        self.closed = False

    def send(self, event: Event) -> None:
        if self.breaks_at is not None and len(self.sent) >= self.breaks_at:
            raise UserError("the MIDI port 'memory' took no more notes: unplugged")
        self.sent.append((time.monotonic(), event))

    def close(self) -> None:
        self.closed = True

    @property
    def sounding(self) -> set[int]:
        now: set[int] = set()
        for _, event in self.sent:
            if event.kind == ON:
                now.add(event.pitch)
            elif event.kind == OFF:
                now.discard(event.pitch)
        return now


# --- what is due when, with a clock of our own --------------------------------------------------------------------


def test_nothing_sounds_before_the_start_and_then_everything_in_order():
    schedule = Schedule(begin=10.0)
    schedule.push(note(10.0, 60, 1.0) + note(10.5, 62, 0.2), known=11.0, now=0.0)
    assert schedule.due(100.0) == []
    assert schedule.wait(100.0) is None
    schedule.start(100.0)
    assert [event.pitch for event in schedule.due(100.0)] == [60]
    assert schedule.wait(100.0) == pytest.approx(0.5)
    assert [(event.kind, event.pitch) for event in schedule.due(100.8)] == [(ON, 62), (OFF, 62)]
    assert [(event.kind, event.pitch) for event in schedule.due(101.0)] == [(OFF, 60)]
    assert schedule.empty
    assert schedule.under_runs == 0


def test_music_waits_for_a_model_that_falls_behind_and_the_under_run_is_counted():
    schedule = Schedule(begin=0.0)
    schedule.push(note(0.0, 60), known=0.5, now=0.0)
    schedule.start(0.0)
    schedule.due(0.5)
    schedule.push(note(0.5, 62), known=1.0, now=2.0)  # 1.5 s late
    assert schedule.under_runs == 1
    assert [event.pitch for event in schedule.due(2.0)] == [62]
    schedule.push(note(1.0, 64), known=1.5, now=2.3)  # early again
    assert schedule.under_runs == 1
    assert [(event.kind, event.pitch) for event in schedule.due(2.3)] == [(OFF, 62)]
    assert schedule.wait(2.3) == pytest.approx(0.2)
    assert [(event.kind, event.pitch) for event in schedule.due(2.51)] == [(ON, 64)]


def test_what_later_tokens_may_still_precede_is_held_back_until_all_is_known():
    schedule = Schedule(begin=0.0)
    schedule.push(note(0.0, 60, 3.0), known=1.0, now=0.0)
    schedule.start(0.0)
    assert len(schedule.due(5.0)) == 1
    assert schedule.wait(5.0) is None
    schedule.complete = True
    assert schedule.wait(2.0) == pytest.approx(1.0)
    assert [event.kind for event in schedule.due(5.0)] == [OFF]


# --- the thread that sends ----------------------------------------------------------------------------------------


def test_notes_go_out_on_time():
    port = MemoryPort()
    with Outlet(port, begin=0.0) as outlet:
        outlet.push([event for i in range(8) for event in note(i * 0.05, 60 + i, 0.02)], known=1.0)
        outlet.start()
        outlet.finish(lambda: False)
    onsets = [at for at, event in port.sent if event.kind == ON]
    assert len(onsets) == 8
    gaps = [later - earlier for earlier, later in itertools.pairwise(onsets)]
    assert sum(gaps) == pytest.approx(0.35, abs=0.05)
    assert port.sounding == set()


def test_a_pitch_struck_again_ends_first_and_its_earlier_end_comes_to_nothing():
    port = MemoryPort()
    with Outlet(port, begin=0.0) as outlet:
        outlet.push(note(0.0, 60, 0.1) + note(0.05, 60, 0.15), known=1.0)
        outlet.finish(lambda: False)
    assert [event.kind for _, event in port.sent] == [ON, OFF, ON, OFF]
    assert port.sent[-1][0] - port.sent[0][0] == pytest.approx(0.2, abs=0.05)


def test_whatever_ends_the_playing_nothing_is_left_sounding():
    port = MemoryPort()

    def break_off() -> None:
        with Outlet(port, begin=0.0) as outlet:
            outlet.push([*note(0.0, 60, 60.0), *note(0.0, 64, 60.0), Event(0.0, PEDAL, SUSTAIN, 127)], known=100.0)
            outlet.start()
            time.sleep(0.1)
            assert port.sounding == {60, 64}
            raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="the model broke"):
        break_off()
    assert port.sounding == set()
    assert port.sent[-1][1] == Event(0.0, PEDAL, SUSTAIN, 0)


# --- a model playing ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tsd():
    pytest.importorskip("miditok")
    from dsmr.music.tokenizer import vocabulary_of

    return vocabulary_of("tsd")


@pytest.fixture(scope="module")
def model(tsd):
    torch.manual_seed(0)
    schedule = "two_scale(layers=2, long=40, short=9, n_long=1)"
    model = DSMRModel(DSMRConfig(tsd.size, schedule, d_model=16, n_heads=2, segment_length=12, tie_embeddings=False))
    return model.eval()


@pytest.fixture
def player(model, tsd, monkeypatch):
    """Draws a note every 50 ms, none longer than a fifth of a second: the playing ends when the last has ended."""
    from dsmr.music.progress import Progress

    honest = Progress.allowed
    shifts = tsd.of_type("TimeShift")
    step = shifts & (tsd.ticks == tsd.ticks_per_second // 20)
    long = tsd.of_type("Duration") & (tsd.ticks > tsd.ticks_per_second // 5)

    def allowed(self):
        may = honest(self) & ~long
        moved = bool(shifts[self.grammar.previous])
        return may & step if bool((may & step).any()) and not moved else may & ~shifts

    monkeypatch.setattr(Progress, "allowed", allowed)
    return Player.begin(model, [tsd.bos_id], Sampling(seed=1), tsd)


@pytest.mark.soak
def test_a_model_plays_in_real_time_and_what_it_plays_is_kept(player, tmp_path):
    port, begun = MemoryPort(), time.monotonic()
    done = perform(player, port, Limits(seconds=1.0), look_ahead=0.3, recorder=Recorder(tmp_path / "played.mid"))
    assert 0.5 < done.seconds < 1.0
    assert time.monotonic() - begun > done.seconds
    assert done.notes == sum(event.kind == ON for _, event in port.sent) > 5
    assert done.under_runs == 0
    assert not done.interrupted
    assert port.sounding == set()
    from dsmr.music.pianoroll import score_notes
    from dsmr.music.tokenizer import read_midi

    assert len(score_notes(read_midi(tmp_path / "played.mid"))) == done.notes


@pytest.mark.soak
def test_a_slow_model_is_late_and_says_so(player, monkeypatch):
    honest = Player._draw

    def slow(self, allowed):
        time.sleep(0.03)
        return honest(self, allowed)

    monkeypatch.setattr(Player, "_draw", slow)
    done = perform(player, MemoryPort(), Limits(), max_tokens=40, look_ahead=0.05)
    assert done.under_runs > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupting_ends_every_note_and_keeps_what_was_played(number, player, tmp_path):
    port = MemoryPort()
    former = signal.signal(number, signal.default_int_handler)  # which `nohup` has ignored
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    try:
        done = perform(player, port, Limits(seconds=20.0), look_ahead=0.2, recorder=Recorder(tmp_path / "played.mid"))
    finally:
        signal.signal(number, former)
    assert done.interrupted
    assert len(port.sent) > 2
    assert port.sounding == set()
    assert (tmp_path / "played.mid").stat().st_size > 40


def test_a_recording_that_cannot_be_written_ends_no_playing_and_loses_no_stream(
    player, model, tsd, tmp_path, monkeypatch
):
    from dsmr.live import performance

    port, kept, way = MemoryPort(), tmp_path / "kept.stream", tmp_path / "played.mid" / "in the way"
    monkeypatch.setattr(performance, "load_run", lambda *given, **options: (model, tsd))
    monkeypatch.setattr(performance, "OutputPort", lambda *given: port)
    options = {"tokens": 20, "look_ahead": 0.1, "sampling": Sampling(seed=1), "dtype": "float32", "save_state": kept}
    with pytest.raises(UserError) as said:
        performance.play_live(
            tmp_path / "run", out=tmp_path / "played.mid", say=lambda line: way.mkdir(parents=True), **options
        )
    assert f"not written: {tmp_path / 'played.mid'}; written: {kept}" in str(said.value)
    assert kept.is_file()
    assert len(port.sent) > 5
    assert port.sounding == set()
    monkeypatch.setattr(performance, "save_player", lambda path, player: (_ for _ in ()).throw(UserError("disk full")))
    with pytest.raises(UserError, match=r"disk full; not written: .*kept\.stream; written: .*again\.mid"):
        performance.play_live(tmp_path / "run", out=tmp_path / "again.mid", say=lambda line: None, **options)
    assert (tmp_path / "again.mid").is_file()


def test_what_the_tokens_do_not_tell_of_the_prompt_is_said(player, model, tsd, tmp_path, monkeypatch):
    from small_scores import score_of

    from dsmr.live import performance
    from dsmr.music.tokenizer import write_midi

    monkeypatch.setattr(performance, "load_run", lambda *given, **options: (model, tsd))
    monkeypatch.setattr(performance, "OutputPort", lambda *given: MemoryPort())
    write_midi(tmp_path / "a\nb.mid", score_of([(0.0, 30.0, 60), (1.0, 1.0, 5), (2.0, 1.0, 64)]))
    said = []
    options = {"tokens": 4, "look_ahead": 0.1, "sampling": Sampling(seed=1), "dtype": "float32"}
    performance.play_live(tmp_path / "run", prompt=tmp_path / "a\nb.mid", say=said.append, **options)
    assert said[:2] == [
        rf"{tmp_path}/a\nb.mid: 1 notes left out: pitch outside 21 to 108.",
        rf"{tmp_path}/a\nb.mid: 1 notes changed: longer than 10 s (cut to it).",
    ]


def test_a_port_that_goes_away_is_a_sentence_and_nothing_played_is_lost(player, tmp_path):
    port = MemoryPort(breaks_at=12)
    with pytest.raises(UserError, match="took no more notes: unplugged"):
        perform(player, port, Limits(seconds=20.0), look_ahead=0.1, recorder=Recorder(tmp_path / "played.mid"))
    assert len(port.sent) == 12
    assert (tmp_path / "played.mid").stat().st_size > 40


def test_numbers_that_break_are_a_sentence_and_nothing_is_left_sounding(player, model, tmp_path):
    port = MemoryPort()

    def spoil() -> None:
        model.norm.weight.data.fill_(torch.nan)
        player._step = None  # made anew from the weights as they are now

    threading.Timer(0.4, spoil).start()
    try:
        with pytest.raises(UserError, match="not finite"):
            perform(player, port, Limits(seconds=20.0), look_ahead=0.1, recorder=Recorder(tmp_path / "played.mid"))
    finally:
        model.norm.weight.data.fill_(1.0)
    assert port.sounding == set()
    assert (tmp_path / "played.mid").stat().st_size > 40


def test_a_look_ahead_of_nothing_is_refused(player):
    with pytest.raises(UserError, match="look-ahead must be more than 0 seconds, got 0"):
        perform(player, MemoryPort(), Limits(), look_ahead=0.0)


# --- ports, with a driver in memory ---------------------------------------------------------------------------------


@pytest.fixture
def driver(monkeypatch):
    """mido with a driver of two ports that exist in memory only; (messages sent, messages to be received)."""
    mido = pytest.importorskip("mido")
    sent: list[object] = []
    waiting: list[object] = []

    class Output(mido.ports.BaseOutput):
        def _send(self, message):
            sent.append(message)

    class Input(mido.ports.BaseInput):
        def _receive(self, block=True):
            while waiting:
                self._messages.append(waiting.pop(0))

    module = ModuleType("dsmr_memory_driver")
    module.Output, module.Input = Output, Input
    names = ["Piano in memory", "Organ in memory"]
    module.get_devices = lambda **_: [{"name": name, "is_input": True, "is_output": True} for name in names]
    monkeypatch.setitem(sys.modules, "dsmr_memory_driver", module)
    backend = mido.Backend("dsmr_memory_driver")
    for name in ("open_output", "open_input", "get_output_names", "get_input_names"):
        monkeypatch.setattr(mido, name, getattr(backend, name))
    return sent, waiting, names


def test_ports_are_named_chosen_by_a_part_of_their_name_and_send_what_they_should(driver):
    from dsmr.live.ports import OutputPort, port_names

    sent, _, names = driver
    assert port_names() == (names, names)
    port = OutputPort("Organ")
    assert port.name == "Organ in memory"
    for event in (*note(0.0, 60), Event(0.0, PEDAL, SUSTAIN, 127)):
        port.send(event)
    assert [message.bytes() for message in sent] == [[0x90, 60, 64], [0x80, 60, 0], [0xB0, 64, 127]]
    port.close()
    with pytest.raises(UserError, match=r"'Organ in memory' took no more notes: send.. called on closed port"):
        port.send(note(0.0, 60)[0])
    with pytest.raises(UserError, match="no MIDI output port called 'Harp': there are 'Piano in memory', 'Organ"):
        OutputPort("Harp")
    names.clear()
    with pytest.raises(UserError, match=r"there is no MIDI output port: .*--virtual"):
        OutputPort()


def test_a_driver_that_fails_is_a_sentence(driver, monkeypatch):
    import mido

    from dsmr.live.ports import OutputPort, port_names

    def fail(*_, **__):
        raise RuntimeError("ALSA: no such device\nand more")

    monkeypatch.setattr(mido, "get_output_names", fail)
    with pytest.raises(UserError, match=r"no MIDI ports to be had here: ALSA: no such device$"):
        port_names()
    monkeypatch.undo()
    monkeypatch.setattr("mido.open_output", fail)
    with pytest.raises(UserError, match="'dsmr' cannot be opened: ALSA"):
        OutputPort(virtual=True)


def test_a_driver_that_is_not_installed_is_named_with_what_installs_it(driver, monkeypatch):
    """mido without python-rtmidi takes in its driver only when it is asked for a port."""
    from dsmr.live.ports import OutputPort, port_names

    def fail(*_, **__):
        raise ModuleNotFoundError("No module named 'rtmidi'")

    for name in ("get_output_names", "open_output"):
        monkeypatch.setattr(f"mido.{name}", fail)
    for ask in (port_names, OutputPort, lambda: OutputPort(virtual=True)):
        with pytest.raises(UserError, match=r"pip install 'dsmr\[play\]': No module named 'rtmidi'"):
            ask()


def test_what_is_played_live_becomes_a_prompt(driver, tsd):
    import mido

    from dsmr.live.ports import listen, prompt_of

    _, waiting, _ = driver
    now = iter(i * 0.1 for i in range(1000))
    script = {3: ("note_on", 60, 80), 5: ("note_on", 64, 70), 7: ("note_off", 60, 0), 9: ("note_on", 64, 0)}
    tick = -1

    def clock() -> float:
        nonlocal tick
        tick += 1
        if tick in script:
            kind, pitch, velocity = script[tick]
            waiting.append(mido.Message(kind, note=pitch, velocity=velocity))
        return next(now)

    heard = listen("Piano", 30.0, pause=0.5, clock=clock)
    assert [(round(on, 1), round(length, 1), pitch, velocity) for on, length, pitch, velocity in heard] == [
        (0.0, 0.4, 60, 80),
        (0.2, 0.4, 64, 70),
    ]
    prompt = prompt_of(heard, tsd)
    assert prompt[0] == tsd.bos_id
    assert tsd.count_notes(prompt) == 2
    with pytest.raises(UserError, match="nothing was played on the MIDI port 'Piano in memory' in 30 s"):
        listen("Piano", 30.0, clock=iter([0.0, 10.0, 29.9, 30.0, 30.0]).__next__)  # a silent port

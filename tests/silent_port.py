"""A MIDI port that nobody hears, in place of `dsmr.live.ports.OutputPort`."""


class SilentPort:
    name = "silent"

    def send(self, event: object) -> None:
        pass

    def close(self) -> None:
        pass

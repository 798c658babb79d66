"""The `dsmr` program: one file a verb, thin; `app` puts them together.

May import every other room, and imports those that compute inside the commands, so that `dsmr --help` answers at once.
"""


def main() -> None:
    """The console script."""
    import io
    import os
    import sys

    from dsmr.console.stopping import raise_when_signalled, signal_of
    from dsmr.console.terminal import fail, interrupted

    for closed in range(3):  # else the first file that is opened would be what libraries print into
        try:
            os.fstat(closed)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open as long as the program is)
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    raise_when_signalled()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot print must not end the program
    if "" in sys.argv[1:]:  # of `--out "$OUT"` without OUT: as a path it would be the working directory
        fail("an argument is empty: is a variable of the shell not set?", 2)
    try:
        from dsmr.cli.app import app  # here, so that importing the room costs nothing

        app()
    except KeyboardInterrupt as error:
        interrupted(signal_of(error))

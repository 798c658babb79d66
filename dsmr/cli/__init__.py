"""The `dsmr` program: one file a verb, thin; `app` puts them together.

May import every other room, and imports those that compute inside the commands, so that `dsmr --help` answers at once.
"""


def main() -> None:
    """The console script."""
    import io
    import sys

    from dsmr.cli.app import app  # here, so that importing the room costs nothing
    from dsmr.console.terminal import fail

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot print must not end the program
    if "" in sys.argv[1:]:  # of `--out "$OUT"` without OUT: as a path it would be the working directory
        fail("an argument is empty: is a variable of the shell not set?", 2)
    app()

"""The `dsmr` program: one file a verb, thin; `app` puts them together.

May import every other room, and imports those that compute inside the commands, so that `dsmr --help` answers at once.
"""


def main() -> None:
    """The console script."""
    from dsmr.cli.app import app  # here, so that importing the room costs nothing

    app()

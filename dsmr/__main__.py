"""`python -m dsmr`: the same program as the console script `dsmr`."""

from dsmr.cli import main

if __name__ == "__main__":
    main()

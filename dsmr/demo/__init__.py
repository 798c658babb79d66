"""The first five minutes: everything once, on composed pieces, with a picture at the end. May import every room but
`cli`.
"""

from dsmr.doors import door

__getattr__ = door(
    __name__,
    {
        "DemoSize": "dsmr.demo.run",
        "run_demo": "dsmr.demo.run",
    },
)

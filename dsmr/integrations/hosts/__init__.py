"""Models of other people whose attention is replaced, layer by layer, by one with a memory: `replace_attention`."""

from dsmr.doors import door

__getattr__ = door(__name__, {"replace_attention": "dsmr.integrations.hosts.replacing"})

"""Guests in other people's models: a memory horizon for every layer of a model that is not ours. May import `model`."""

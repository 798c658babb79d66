"""Depth-Structured Music Recurrence: a Transformer that reads whole pieces with a memory horizon for every layer."""

"""Measurements, side by side with what a user would otherwise do; each checks its results before it is timed."""

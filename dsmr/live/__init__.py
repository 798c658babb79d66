"""Real time: a model's music through MIDI ports, on time, with every note ended whatever happens. May import
`generation` and what lies below it.
"""

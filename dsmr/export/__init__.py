"""Making a model that plays without PyTorch: its graph, its weights, the scales of its memory, the files. What it makes
is played by `exported`. May import `generation`, `exported`, `model`, `music` and `console`.
"""

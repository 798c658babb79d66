"""What a training run keeps on disk: its settings, checkpoints, metrics, and how it is found again. May import `model`,
`corpus`, `music` and `console`.
"""

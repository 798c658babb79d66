"""The paper's models side by side: presets, tables of cells, the runner, the report. May import `training`,
`evaluation`, `runs`, `model`, `corpus`, `music`, `console` and the kernels' costing.
"""

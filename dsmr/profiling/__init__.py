"""What memory schedules cost on the present device: the work behind `dsmr profile` and `dsmr budget`.

`cost` predicts, `row` measures one kind of work in a process of its own, described by `job` and kept as `record`;
`profile` goes through schedules and rows, `report` and `plots` show the result, and `budget` proposes schedules. May
import `generation`, `model`, `console` and `dsmr_kernels`.
"""

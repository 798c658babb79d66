"""What the questions share: peers, models, shapes, rows, goals, and the machine that they were asked on."""

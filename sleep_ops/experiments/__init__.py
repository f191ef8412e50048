"""The paper's experiments as data: presets of runs, figures as grids over them, and their plots."""

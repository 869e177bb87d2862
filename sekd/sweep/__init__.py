"""Sweeps: methods x grid x seeds as runs, their evaluations, and a table with paired differences."""

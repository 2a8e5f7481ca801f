"""Ablations: train with one change at a time, over several seeds, and compare the scores.

The command is tools/ablate.py. `plan` reads the plan's file, `runs` trains, `scoring` scores each run, `statistics`
compares the scores (intervals over seeds, differences, verdicts), `figures` and `report` write the results.
`report.METHOD` describes the method.
"""

"""Ablations: the same training with one thing changed at a time, over several seeds, and what the scores show.

tools/ablate.py is the command. `plan` reads the file, `runs` trains, `scoring` scores each run, `statistics` compares
the scores (intervals over seeds, differences, verdicts), `figures` and `report` write the results. `report.METHOD`
describes the method.
"""

"""Training as a Slurm job: the code on each rank, the requeue after an attempt, cluster profiles, and a local Slurm.

`tools/submit.py` submits and manages jobs; a job runs `dist_t2i/train.py`.
"""

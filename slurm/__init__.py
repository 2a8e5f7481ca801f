"""Training as a Slurm job: the job (job, rank), its end (after, attempts), cluster profiles, and Slurm on one machine.

`tools/submit.py` submits and manages jobs; a job runs `dist_t2i/train.py`.
"""

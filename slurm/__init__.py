"""Training as a Slurm job: the job and its life (job, after, attempts), cluster profiles, Slurm on one machine.

Submitting and looking after jobs is `tools/submit.py`; what runs inside a job is `dist_t2i/train.py`, as anywhere.
"""

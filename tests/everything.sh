#!/bin/sh
# Every test, for `make test`: those of jobs first, which share out the cores by themselves, then all others on WORKERS
# processes, file by file. What follows the interpreter goes to pytest: files, -k, -x ...
python=$1
shift
"$python" -m pytest -m slurm "$@"
jobs=$?
"$python" -m pytest -m "not slurm" -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
others=$?
nothing=5  # pytest's status when it was given no test
if [ "$others" = "$nothing" ] && [ "$jobs" != "$nothing" ]; then others=0; fi
if [ "$jobs" = "$nothing" ]; then jobs=0; fi
if [ "$jobs" != 0 ]; then exit "$jobs"; fi
exit "$others"

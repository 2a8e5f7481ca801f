#!/bin/sh
# Every test, for `make test`: first those of jobs, which use all cores, then all others on WORKERS processes, file by
# file. Arguments after the interpreter go to pytest: files, -k, -x ...
python=$1
shift
"$python" -m pytest -m "slurm and not long" "$@"
jobs=$?
"$python" -m pytest -m "not slurm and not long" -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
others=$?
nothing=5  # pytest's status when it has selected no test
if [ "$others" = "$nothing" ] && [ "$jobs" != "$nothing" ]; then others=0; fi
if [ "$jobs" = "$nothing" ]; then jobs=0; fi
if [ "$jobs" != 0 ]; then exit "$jobs"; fi
exit "$others"

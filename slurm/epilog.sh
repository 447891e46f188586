#!/bin/bash
# Slurm epilog: clear a node of what a killed gms-launch run left behind. In slurm.conf: Epilog=/path/to/epilog.sh
#
# Runs as root after every job on the node. `sweep` touches only runs whose agent is dead, of any user, each as that user;
# a live run of another job is told by its lock and left alone. It ends within 40 s whatever users have prepared, and with
# 1 when something of theirs could not be swept. Processes are dead by then with proctrack/cgroup, files are not.
# Slurm gives an epilog no PATH worth the name: say where gms-launch is. It must be root's, as everything that it imports:
# one in a user's own environment would be run as root.
GMS_LAUNCH=${GMS_LAUNCH:-gms-launch}
PATH=/usr/local/bin:/usr/bin:/bin:$PATH
# What it did, and what went wrong, is in the node's log (journalctl -t gms-launch-epilog).
say() { logger -t gms-launch-epilog -- "job ${SLURM_JOB_ID:-?}: $*" 2>/dev/null; }

program=$(command -v "$GMS_LAUNCH")
if [ -z "$program" ]; then
  say "nothing was swept: there is no $GMS_LAUNCH"
elif [ "$(stat -L -c %u "$program")" != 0 ]; then
  say "nothing was swept: $program is not root's"
else
  out=$(timeout -k 5 60 "$program" sweep 2>&1)
  code=$?
  [ "$out" = "nothing to sweep" ] || say "sweep ended with $code: ${out//$'\n'/; }"
fi
# A failing epilog drains the node, and a leftover file is not worth that.
exit 0

#!/bin/bash
# Slurm epilog: clear a node of what a killed gms-launch run left behind. In slurm.conf: Epilog=/path/to/epilog.sh
#
# Runs as root after every job on the node. `sweep` touches only runs whose agent is dead, of any user; a live run of
# another job is told by its lock and left alone. Processes are dead by then with proctrack/cgroup, files are not.
# Slurm gives an epilog no PATH worth the name: say where gms-launch is.
GMS_LAUNCH=${GMS_LAUNCH:-gms-launch}
PATH=/usr/local/bin:/usr/bin:/bin:$PATH
timeout 60 "$GMS_LAUNCH" sweep >/dev/null 2>&1
# A failing epilog drains the node, and a leftover file is not worth that.
exit 0

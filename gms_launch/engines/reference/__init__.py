"""A small real engine that needs no GPU: dynamo.vllm's flags, environment, log lines, lock and routes, in miniature.

One rank is a process (`python -m gms_launch.engines.reference`) with a worker process for each of its GPUs. The
leader rank runs the Dynamo runtime, holds the lock and schedules; workers own the memory and compute. All workers of
a cohort meet the leader at the master port, and a step needs an answer from every one of them; with data parallelism
from every one of a replica's.
"""

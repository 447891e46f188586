"""`python -m dynamo.vllm ...`: the reference engine under vLLM's flags. Those it does not know are vLLM's business."""

import os
import sys

from gms_launch.engines.reference.__main__ import main

#: vLLM's own flags that come up in tests, each with a value.
TAKE_A_VALUE = ("--max-model-len", "--max-num-seqs", "--gpu-memory-utilization", "--pipeline-parallel-size")
SWITCHES = ("--disable-custom-all-reduce", "--trust-remote-code", "--no-enforce-eager")

argv = sys.argv[1:]
kept = []
while argv:
    word = argv.pop(0)
    if word in TAKE_A_VALUE:
        argv.pop(0)
    elif word not in SWITCHES:
        kept.append(word)
if "--master-port" not in kept:
    kept += ["--master-port", os.environ["VLLM_PORT"]]  # alone on its node vLLM picks a port of this range by itself
os.environ["REFERENCE_DEVICE"] = "host"
sys.argv[1:] = kept
main()

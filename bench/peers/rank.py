"""One rank of the toy group, whoever launches it: the reference engine's rank, told its place as torchrun tells it.

RANK and WORLD_SIZE are the launcher's; PEERS_* are the bench's. What it says goes to a file of its own in PEERS_LOGS.
"""

import os
import sys

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
directory = "/dev/shm/peers"
os.environ |= {
    "GMS_LAUNCH_TAG": f"{os.environ['PEERS_TAG']}/{rank}",
    "GMS_LAUNCH_MEETING_SECRET": os.environ["PEERS_TAG"].encode().hex(),
    "ENGINE_ID": "0",
    "DYN_VLLM_GMS_SHADOW_MODE": "true",
    "GMS_SOCKET_DIR": directory,
    "FAILOVER_LOCK_PATH": f"{directory}/failover.lock",
    "ETCD_ENDPOINTS": os.environ["PEERS_ETCD"],
    "ETCD_LEASE_TTL": "10",
    "DYN_TCP_RPC_HOST": os.environ["PEERS_ADDRESS"],
    "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
    "DYN_EVENT_PLANE": "zmq",
}
if rank == 0:
    os.environ |= {"DYN_SYSTEM_PORT": "18080", "DYN_SYSTEM_HOST": os.environ["PEERS_ADDRESS"]}
    os.environ["DYN_SYSTEM_STARTING_HEALTH_STATUS"] = "notready"
log = os.open(f"{os.environ['PEERS_LOGS']}/rank{rank}-{restart}-{os.urandom(4).hex()}.log", os.O_CREAT | os.O_WRONLY)
os.dup2(log, 1)
os.dup2(log, 2)
argv = [sys.executable, "-m", "gms_launch.engines.reference", "--model", os.environ["PEERS_MODEL"]]
argv += ["--served-model-name", "tiny", "--load-format", "gms", "--tensor-parallel-size", str(world)]
argv += ["--nnodes", str(world), "--node-rank", str(rank), "--master-addr", os.environ["PEERS_LEADER"]]
argv += ["--master-port", "29600", *(["--headless"] if rank else [])]
os.execv(sys.executable, argv)

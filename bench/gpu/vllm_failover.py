"""The real engine's failover: dynamo.vllm under gms-launch, and under the bare recipe, in one run on one machine.

    python bench/gpu/vllm_failover.py [--nodes 1|2] [--kills 5] [--recipe-kills 2] [--model DIR] [-- ENGINE ARGS]

Runs wherever `dynamo.vllm` and `gpu_memory_service` can be imported and etcd is on PATH; says what it lacks at once,
with exit code 2. Without --model it makes a random Qwen3 model of half a GiB. `--nodes 2` is two nodes of one run on
this machine, a GPU each, TP=2, joined over loopback.

While requests go out every 20 ms, ranks of the primary are SIGKILLed from outside. For each kill: time to the first
answer to a request sent after it, requests that failed, time until a fresh shadow is parked; the greedy completion must
be the same before and after, and the weights read once. The recipe starts the same processes and supervises nothing: a
whole group is killed and, with two nodes, the leader alone and the remote rank alone, each watched for --watch seconds.

Needs nothing but gms-launch and the standard library; every process that it starts is ended by it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

PROMPT = "the quick brown fox"
TOKENS = 16
#: A first answer later than this is no failover but an outage (seconds).
OUTAGE = 5.0
EVERY = 0.02
NEEDS = ("dynamo.vllm", "dynamo.frontend", "vllm", "gpu_memory_service")
PARKED = re.compile(r"startup probe now passing, waiting for lock")


def lacking(options: argparse.Namespace) -> list[str]:
    """What this machine has not got; nothing heavy is imported to find out."""
    try:
        from gms_launch.engines import installed
        from gms_launch.gms import gpus
    except ImportError as exc:
        return [f"gms-launch ({exc}): pip install it into this Python, {sys.executable}"]
    missing = [f"the Python module {m}" for m in installed.look("", NEEDS).missing]
    if not options.model:
        missing += [f"the Python module {m}, to make a model, or --model" for m in _model_makers(installed)]
    elif not (options.model / "config.json").is_file():
        missing.append(f"a model in {options.model} (no config.json)")
    if shutil.which("etcd") is None:
        missing.append("etcd on PATH")
    found = len(gpus.look())
    if found < options.nodes:
        missing.append(f"{options.nodes} GPUs: NVML shows {found} {gpus.problem()}".rstrip())
    if "ENGINE_ID" in os.environ:
        missing.append("an environment without ENGINE_ID")
    return missing


def _model_makers(installed: Any) -> tuple[str, ...]:
    found: tuple[str, ...] = installed.look("", ("transformers", "torch", "tokenizers")).missing
    return found


def make_model(directory: Path) -> None:
    """A random model of the Qwen3 architecture, about 0.5 GiB in bfloat16, with a tokenizer of its own."""
    from gms_launch.engines.reference.demo_model import make_tokenizer

    directory.mkdir(parents=True)
    size = make_tokenizer(directory, 1)
    code = (
        "import sys, torch\nfrom transformers import Qwen3Config, Qwen3ForCausalLM\ntorch.manual_seed(1)\n"
        "config = Qwen3Config(vocab_size=int(sys.argv[2]), hidden_size=1024, intermediate_size=3072, "
        "num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=8, head_dim=128, "
        "max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=2)\n"
        "model = Qwen3ForCausalLM(config).to(torch.bfloat16)\nmodel.generation_config.eos_token_id = 2\n"
        "model.save_pretrained(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(directory), str(size)], check=True)


def free_port() -> int:
    """A port below the ephemeral range, which Dynamo reads as a signed 16-bit number."""
    while True:
        port = random.randrange(12000, 31000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def complete(port: int, model: str, tokens: int, timeout: float) -> str | None:
    """The greedy completion; None for anything but a 200 in time."""
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return str(json.load(answer)["choices"][0]["text"])
    except (OSError, ValueError, KeyError, urllib.error.URLError):
        return None


def text_of(port: int, model: str) -> str | None:
    """The greedy completion, asked for until it comes: a router may still know a dead engine."""
    deadline = time.monotonic() + 30
    while (text := complete(port, model, TOKENS, 30.0)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return text


class Traffic:
    """A request every 20 ms, each in a thread of its own, whatever the others do."""

    def __init__(self, port: int, model: str) -> None:
        self._port, self._model = port, model
        self._answers: list[tuple[float, float, bool]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(256)
        self._thread = threading.Thread(target=self._send, daemon=True)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _send(self) -> None:
        while not self._stop.wait(EVERY):
            self._pool.submit(self._one)

    def _one(self) -> None:
        sent = time.perf_counter()
        ok = complete(self._port, self._model, 1, 5.0) is not None
        with self._lock:
            self._answers.append((sent, time.perf_counter(), ok))

    def first_after(self, moment: float, timeout: float) -> float | None:
        """Seconds from `moment` to the first answer to a request sent after it; None when none came in time."""
        while time.perf_counter() < moment + timeout:
            with self._lock:
                done = [d for s, d, ok in self._answers if ok and s >= moment]
            if done:
                return min(done) - moment
            time.sleep(0.002)
        return None

    def result(self, moment: float, first: float | None, after: float) -> dict[str, Any]:
        """The first answer, the requests that failed before it, and those that failed in the `after` seconds since."""
        end = moment + (first or 0.0)
        if first is not None:
            time.sleep(after)
        with self._lock:
            failed = [s for s, _, ok in self._answers if not ok and s >= moment]
        later = sum(s > end for s in failed) if first is not None else 0
        return {"first_answer_s": first, "failed_requests": len(failed) - later, "failed_later": later}


def environ() -> dict[str, str]:
    """Ours without what would make a run of it: a NATS that is named and not there blocks a start for two minutes."""
    drop = ("GMS_LAUNCH_", "SLURM_", "NATS_", "ETCD_")
    return {k: v for k, v in os.environ.items() if not k.startswith(drop)}


class Node:
    """One node of the run on this machine: its GPU, its environment."""

    def __init__(self, rank: int, options: argparse.Namespace, directory: Path) -> None:
        self.rank = rank
        self.gms_dir = directory / f"g{rank}"
        self.gms_dir.mkdir()
        self.env = environ()
        if options.nodes > 1:
            visible = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
            self.env["CUDA_VISIBLE_DEVICES"] = visible[rank] if len(visible) > rank else str(rank)


class Launched:
    """The engine under gms-launch."""

    def __init__(self, model: Path, options: argparse.Namespace, place: Path) -> None:
        self.model, self.options = model, options
        self.port = free_port()
        self.home = place / "home"
        self.run = f"bench-{os.getpid()}"  # two may run on one machine
        self._agents: list[subprocess.Popen[bytes]] = []
        flags = ["--run-id", self.run, "--engine", "vllm", "--model", str(model), "--frontend-port", str(self.port)]
        flags += ["--frontend-host", "127.0.0.1", "--tp", str(options.nodes), "--nnodes", str(options.nodes)]
        flags += ["--warm-slots", str(options.warm_slots)]
        flags += [] if shutil.which("nats-server") else ["--no-nats"]
        if options.nodes > 1:
            flags += ["--leader-addr", "127.0.0.1", "--interface", "lo"]
        self._log = place / "agents.log"
        for rank in range(options.nodes):
            node = Node(rank, options, Path(tempfile.mkdtemp(dir=place)))
            argv = [sys.executable, "-m", "gms_launch", "up", *flags, "--node-rank", str(rank), "--", *options.engine]
            with open(self._log, "ab") as log:
                env = node.env | {"GMS_LAUNCH_HOME": str(self.home)}
                self._agents.append(subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True))

    def cli(self, *args: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "gms_launch", *args]
        env = environ() | {"GMS_LAUNCH_HOME": str(self.home)}
        return subprocess.run(argv, env=env, capture_output=True, text=True, check=False)

    def wait_full(self, timeout: float) -> dict[str, Any]:
        """Until every shadow is parked, and every warm slot waits."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for agent in self._agents:
                if agent.poll() is not None:
                    raise SystemExit(f"gms-launch up ended with {agent.returncode}:\n{self._log.read_text()[-6000:]}")
            done = self.cli("status", "--run", self.run, "--json")
            if done.returncode == 0 and (found := json.loads(done.stdout))["redundancy"] == "full":
                services = [s for n in found["nodes"] for s in n["services"]]
                if all(s["state"] == "ready" for s in services if s["name"].startswith("warm-")):
                    return dict(found)
            time.sleep(0.2)
        raise SystemExit(f"redundancy was not full within {timeout:g} s:\n{self._log.read_text()[-6000:]}")

    def measure(self) -> dict[str, Any]:
        begun = time.perf_counter()
        status = self.wait_full(self.options.timeout)
        started = time.perf_counter() - begun
        say(f"gms-launch: redundancy full after {started:.1f} s")
        text = text_of(self.port, str(self.model))
        kills: list[dict[str, Any]] = []
        for k in range(self.options.kills):
            primary = status["cohorts"][status["primary"]]
            victim = primary["ranks"][k % self.options.nodes]
            with Traffic(self.port, str(self.model)) as traffic:
                time.sleep(1.0)  # traffic is under way before the fault
                moment = time.perf_counter()
                os.killpg(victim["pgid"], signal.SIGKILL)
                first = traffic.first_after(moment, self.options.watch + 60)
                seen = traffic.result(moment, first, self.options.after)
            status = self.wait_full(self.options.timeout)
            same = text_of(self.port, str(self.model)) == text
            kills.append({"rank": victim["node_rank"], **seen, "same_text": same})
            say(f"gms-launch: rank {victim['node_rank']} killed: {kills[-1]}")
        sockets = [g for n in status["nodes"] for g in n["gms"] if g["tag"] == "weights"]
        answered = [k["first_answer_s"] for k in kills if k["first_answer_s"] is not None]
        return {
            "start_to_full_s": round(started, 1),
            "first_answer_ms": summary(answered),
            "answered": f"{len(answered)} of {len(kills)}",
            "same_text_every_time": text is not None and all(k["same_text"] for k in kills),
            "weights_written": [g["loads"] for g in sockets],
            "gpus": [{k: g[k] for k in ("name", "used_bytes", "holders")} for n in status["nodes"] for g in n["gpus"]],
            "kills": kills,
            "timeline": json.loads(self.cli("timeline", "--run", self.run, "--json").stdout or "{}").get("failovers"),
            "timeline_text": self.cli("timeline", "--run", self.run).stdout,
        }

    def close(self) -> None:
        done = self.cli("down", "--run", self.run)
        say("gms-launch down: " + (done.stdout or done.stderr).strip().replace("\n", "; "))
        for agent in self._agents:
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(60)
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)


class Recipe:
    """The same processes as the shell recipe starts them, with its known mistakes mended and nobody watching."""

    def __init__(self, model: Path, options: argparse.Namespace, place: Path) -> None:
        self.model, self.options = model, options
        self.place = place / "r"  # short: a socket's path has 107 bytes
        self.place.mkdir()
        self.nodes = [Node(rank, options, self.place) for rank in range(options.nodes)]
        self.port, self._etcd, self._lives = free_port(), free_port(), 0
        self._all: list[subprocess.Popen[bytes]] = []
        self._env = {"ETCD_ENDPOINTS": f"http://127.0.0.1:{self._etcd}", "DYN_EVENT_PLANE": "zmq"}
        self._env |= {"DYN_TCP_RPC_HOST": "127.0.0.1", "DYN_TCP_RESPONSE_STREAM_HOST": "lo"}

    def _spawn(self, name: str, argv: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        with open(self.place / f"{name}.log", "ab") as log:
            child = subprocess.Popen(
                argv, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._all.append(child)
        return child

    def services(self) -> None:
        url, peer = f"http://127.0.0.1:{self._etcd}", f"http://127.0.0.1:{free_port()}"
        argv = ["etcd", "--name", "n", "--data-dir", str(self.place / "etcd"), "--listen-client-urls", url]
        argv += ["--advertise-client-urls", url, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        self._spawn("etcd", [*argv, "--initial-cluster", f"n={peer}"], dict(os.environ))
        for node in self.nodes:
            for tag in ("weights", "kv_cache"):
                argv = [sys.executable, "-m", "gpu_memory_service", "--device", "0", "--tag", tag]
                env = node.env | {"GMS_SOCKET_DIR": str(node.gms_dir), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
                self._spawn(f"gms{node.rank}-{tag}", argv, env)
        for node in self.nodes:
            wait(lambda node=node: len(list(node.gms_dir.glob("gms_*.sock"))) == 2, 120, "the GMS sockets")
        argv = [sys.executable, "-m", "dynamo.frontend", "--http-port", str(self.port), "--http-host", "127.0.0.1"]
        self._spawn("frontend", argv, environ() | self._env)

    def cohort(self, engine_id: int) -> tuple[list[subprocess.Popen[bytes]], Path]:
        """Start a cohort; its ranks, and its leader's log."""
        self._lives += 1
        several, port, vllm_port = len(self.nodes) > 1, free_port(), free_port()
        ranks = []
        for node in self.nodes:
            argv = [sys.executable, "-m", "dynamo.vllm", "--model", str(self.model), "--load-format", "gms"]
            argv += ["--enforce-eager", "--enable-sleep-mode", "--tensor-parallel-size", str(len(self.nodes))]
            if several:
                argv += ["--distributed-executor-backend", "mp", "--nnodes", str(len(self.nodes))]
                argv += ["--node-rank", str(node.rank), "--master-addr", "127.0.0.1", "--master-port", str(port)]
            argv += ["--headless"] if node.rank else []
            env = node.env | {"ENGINE_ID": str(engine_id), "DYN_VLLM_GMS_SHADOW_MODE": "true"}
            env |= {"GMS_SOCKET_DIR": str(node.gms_dir), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            env |= {"FAILOVER_LOCK_PATH": str(self.nodes[0].gms_dir / "failover.lock"), "VLLM_HOST_IP": "127.0.0.1"}
            env |= {"VLLM_PORT": str(vllm_port + 50 * node.rank), "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
            if several:
                env |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
                # The reference engine, where it stands in for the real one, wants its ranks to know each other.
                env |= {"GMS_LAUNCH_MEETING_SECRET": f"{engine_id}-{self._lives}".encode().hex()}
            if no_flashinfer():
                env.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
            if node.rank == 0:
                env |= self._env | {
                    "DYN_SYSTEM_PORT": str(free_port()),
                    "DYN_SYSTEM_STARTING_HEALTH_STATUS": "notready",
                }
            ranks.append(self._spawn(f"engine{engine_id}-{self._lives}-{node.rank}", argv + self.options.engine, env))
        return ranks, self.place / f"engine{engine_id}-{self._lives}-0.log"

    def wait_parked(self, ranks: list[subprocess.Popen[bytes]], log: Path) -> None:
        def parked() -> bool:
            if any(r.poll() is not None for r in ranks):
                raise SystemExit(f"recipe: an engine ended while it was starting:\n{log.read_text()[-4000:]}")
            return PARKED.search(log.read_text(errors="replace")) is not None

        wait(parked, self.options.timeout, f"the engine to park ({log})")

    def measure(self) -> dict[str, Any]:
        self.services()
        cohorts = [self.cohort(0), self.cohort(1)]
        for ranks, log in cohorts:
            self.wait_parked(ranks, log)
        wait(lambda: complete(self.port, str(self.model), 1, 5.0) is not None, 120, "the first answer")
        holder = (self.nodes[0].gms_dir / "failover.lock").read_text().strip()
        primary = 1 if holder.endswith("1") else 0
        text = text_of(self.port, str(self.model))
        scopes = ["whole group"] * self.options.recipe_kills
        if len(self.nodes) > 1:
            scopes = ["leader alone", "remote rank alone", *scopes]
        results = []
        for scope in scopes:
            ranks = cohorts[primary][0]
            first = {"leader alone": ranks[:1], "remote rank alone": ranks[1:]}.get(scope, ranks)
            with Traffic(self.port, str(self.model)) as traffic:
                time.sleep(1.0)
                moment = time.perf_counter()
                for rank in first:
                    os.killpg(rank.pid, signal.SIGKILL)
                answer = traffic.first_after(moment, self.options.watch)
                result = {"killed": scope, **traffic.result(moment, answer, self.options.after)}
                if answer is None:
                    rest = time.perf_counter()
                    for rank in ranks:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(rank.pid, signal.SIGKILL)
                    result["first_answer_after_the_rest_was_killed_s"] = traffic.first_after(rest, 60)
            for rank in ranks:
                rank.wait()
            same = text_of(self.port, str(self.model)) == text
            results.append(result | {"same_text": same})
            say(f"recipe: {results[-1]}")
            dead, primary = primary, 1 - primary
            cohorts[dead] = self.cohort(dead)
            self.wait_parked(*cohorts[dead])
        return {"kills": results}

    def close(self) -> None:
        for child in reversed(self._all):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def no_flashinfer() -> bool:
    from gms_launch.engines import installed

    return bool(installed.look("", ("flashinfer",)).missing)


def wait(look: Any, timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not look():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {timeout:g} s for {what}")
        time.sleep(0.05)


def summary(values: list[float]) -> dict[str, float]:
    ms = sorted(v * 1000 for v in values)
    if not ms:
        return {"n": 0}
    return {"n": len(ms), "p50": round(statistics.median(ms), 1), "min": round(ms[0], 1), "max": round(ms[-1], 1)}


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def defaults(model: Path, nodes: int) -> list[str]:
    """Engine arguments that leave room for a second engine: memory for the weights and 8 GiB of everything else."""
    from gms_launch.gms import gpus

    weights = sum(f.stat().st_size for f in model.glob("*.safetensors")) / nodes
    share = (1.3 * weights + (8 << 30)) / gpus.look()[0].total
    args = ["--max-model-len", "2048", "--max-num-seqs", "16", "--gpu-memory-utilization", f"{min(0.4, share):.3f}"]
    return args + (["--disable-custom-all-reduce"] if nodes > 1 else [])


def main() -> None:
    arguments, engine = sys.argv[1:], list[str]()
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, engine = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; a random one is made when not given")
    parser.add_argument("--nodes", type=int, choices=[1, 2], default=1)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--recipe-kills", type=int, default=2, help="kills of the whole group under the recipe")
    parser.add_argument("--warm-slots", type=int, default=0, help="as of `up`: processes that have imported vLLM")
    parser.add_argument("--watch", type=float, default=15.0, help="how long an outage is watched (seconds)")
    parser.add_argument("--after", type=float, default=10.0, help="how long requests go on after the first answer")
    parser.add_argument("--timeout", type=float, default=900.0, help="deadline for engines to be parked (seconds)")
    parser.add_argument("--place", type=Path, default=Path("/dev/shm"), help="where models and logs are put")
    parser.add_argument("--out", type=Path, default=Path("vllm-failover.json"))
    options = parser.parse_args(arguments)
    options.engine = engine
    if missing := lacking(options):
        print("this machine lacks:", *missing, sep="\n  - ", file=sys.stderr)
        sys.exit(2)
    place = Path(tempfile.mkdtemp(prefix="vf-", dir=options.place))
    result: dict[str, Any] = {"command": " ".join([Path(sys.executable).name, *sys.argv])}
    try:
        model = options.model.resolve() if options.model else place / "model"
        if not options.model:
            say("making a model")
            make_model(model)
        options.engine = options.engine or defaults(model, options.nodes)
        result |= about(model, options)
        launched = Launched(model, options, place)
        try:
            result["gms_launch"] = launched.measure()
        finally:
            launched.close()
        if options.recipe_kills:
            recipe = Recipe(model, options, place)
            try:
                result["recipe"] = recipe.measure()
            finally:
                recipe.close()
    finally:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        keep = options.out.with_suffix(".logs")
        shutil.rmtree(keep, ignore_errors=True)
        ignore = shutil.ignore_patterns("*.sock", "*.lock", "etcd", "model", "credentials*")
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(place, keep, ignore=ignore)
        shutil.rmtree(place, ignore_errors=True)
    print(result["gms_launch"].pop("timeline_text"))
    print(json.dumps({k: v for k, v in result["gms_launch"].items() if k not in ("timeline", "kills")}, indent=1))
    print(json.dumps(result.get("recipe"), indent=1))
    say(f"everything is in {options.out}, logs in {options.out.with_suffix('.logs')}")
    if found := outages(result["gms_launch"]["kills"]):
        print("not a failover:", *found, sep="\n  - ", file=sys.stderr)
        sys.exit(1)


def outages(kills: list[dict[str, Any]]) -> list[str]:
    """The kills that ended in an outage instead of a failover: nobody answered within `OUTAGE` seconds, or at all."""
    said = [(f"kill {n}: {k.get('killed', '')}".rstrip(": "), k.get("first_answer_s")) for n, k in enumerate(kills, 1)]
    return [
        f"{what}: no answer for {took:.1f} s" if took else f"{what}: no answer at all"
        for what, took in said
        if took is None or took > OUTAGE
    ]


def about(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    from gms_launch.gms import gpus

    versions = {"python": platform.python_version()}
    for name in ("gms-launch", "ai-dynamo", "ai-dynamo-runtime", "vllm", "torch", "gpu-memory-service"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    names = ", ".join(g.name for g in gpus.look())
    size = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    return {
        "machine": f"{names}; {os.cpu_count()} cores, {platform.platform()}",
        "versions": versions,
        "model_gib": round(size / (1 << 30), 2),
        "nodes": options.nodes,
        "warm_slots": options.warm_slots,
        "engine_args": options.engine,
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # a script, run from anywhere
    from bench.stopping import stoppable

    stoppable(main)

"""The leader rank: Dynamo's runtime around a group of workers, in the order that dynamo.vllm follows.

runtime -> load -> routes -> sleep -> health -> lock -> wake -> register -> serve. The first engine sleeps and wakes
like any other.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from gms_launch.engines.reference import answer, handover, litter, lock
from gms_launch.engines.reference.args import EngineConfig, InjectedError
from gms_launch.engines.reference.batch import Batch
from gms_launch.engines.reference.group import Leader, Peer
from gms_launch.engines.reference.metrics import FailoverMetrics
from gms_launch.engines.reference.spawn import Workers

log = logging.getLogger("reference")


class Engine:
    """What the routes and the endpoint act on."""

    def __init__(self, config: EngineConfig, group: Leader | Peer, metrics: FailoverMetrics) -> None:
        self.config, self.metrics = config, metrics
        self.group = group
        self.replicas = {k: Batch(group, config.workers_of(k)) for k in config.own_replicas}
        self.turns = itertools.cycle(config.own_replicas)
        self.vocabulary, self.context = _sizes(config.model)
        self.asleep = False
        self.endpoint: Any = None
        # For tests: while this file is there, no token comes.
        life = "-".join(config.tag.split("/")[1:3])
        self.wedge = f"{os.path.dirname(config.lock_path)}/wedge-{life}"

    async def sleep(self) -> None:
        await self.group.some(self.config.own_workers, op="sleep")
        self.asleep = True

    async def wake(self) -> None:
        await self.group.some(self.config.own_workers, op="wake")
        self.asleep = False

    # -- routes: replies as upstream's, errors in the body of an HTTP 200 -------------------------------------------

    async def route_sleep(self, body: dict[str, Any]) -> dict[str, str]:
        if self.asleep:
            return {"status": "ok", "message": "Engine already sleeping"}
        await self.endpoint.unregister_endpoint_instance()
        log.info("[Sleep] Unregistered endpoint from discovery - worker removed from routing pool")
        await self.sleep()
        return {"status": "ok", "message": f"Engine slept (level={body.get('level', 1)})"}

    async def route_wake(self, body: dict[str, Any]) -> dict[str, str]:
        if not self.asleep:
            return {"status": "ok", "message": "Engine already awake"}
        await self.wake()
        await self.endpoint.register_endpoint_instance()
        log.info("[Wake] Re-registered endpoint to discovery - worker added back to routing pool")
        return {"status": "ok", "message": "Engine woke"}

    # -- tokens ----------------------------------------------------------------------------------------------------

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        """Stream tokens for Dynamo's preprocessed request."""
        if (kind := self.config.knobs.fault_at("tokens", self.config.tag)) == "error":
            raise InjectedError("error at tokens")
        if kind == "hang" or os.path.exists(self.wedge):
            await asyncio.Event().wait()  # a collective that never ends, with everybody alive
        batch = self._replica(request)
        state = handover.take(request) if self.config.mode == "decode" else None
        if state is None:
            state = answer.read(await batch.digest(), request["token_ids"])
        found = answer.answers(request, state, self.vocabulary, self.context)
        if self.config.mode == "prefill":
            yield await self._prefilled(batch, request, state, found)
            return
        if all(a.finished for a in found):
            yield {"token_ids": [], "finish_reason": "length", "completion_usage": answer.usage(request, found)}
        while going := [a for a in found if not a.finished]:
            if context.is_stopped():
                return
            if self.config.knobs.token_seconds:
                await asyncio.sleep(self.config.knobs.token_seconds)
            shares = await asyncio.gather(*(batch.step(a.state, a.position) for a in going))
            for one, share in zip(going, shares, strict=True):
                chunk = one.take(share)
                yield chunk | ({"completion_usage": answer.usage(request, found)} if one.finished else {})

    def _replica(self, request: dict[str, Any]) -> Batch:
        """Which replica answers: the one that was asked for, or each in turn."""
        asked = (request.get("routing") or {}).get("dp_rank")
        replica = next(self.turns) if asked is None else int(asked)
        self.metrics.asked(replica)
        return self.replicas[replica]

    async def _prefilled(
        self, batch: Batch, request: dict[str, Any], state: int, found: list[answer.Answer]
    ) -> dict[str, Any]:
        """A prefill half's whole answer: one token, which nobody keeps, and the handle for who goes on."""
        first = found[0].take(await batch.step(state, found[0].position))
        handle = handover.give(request, state, self.config.tag)
        usage = answer.usage(request, found[:1])
        return {"token_ids": first["token_ids"], "disaggregated_params": handle, "completion_usage": usage}


def _sizes(model: Path) -> tuple[int, int]:
    """The model's vocabulary and its context, in tokens."""
    import json

    config = json.loads((model / "config.json").read_text())
    return int(config["vocab_size"]), int(config.get("max_position_embeddings", 4096))


async def run(config: EngineConfig) -> None:
    """Serve until told to stop."""
    from dynamo import llm
    from dynamo.common.utils.runtime import create_runtime

    runtime, loop = create_runtime(
        os.environ.get("DYN_DISCOVERY_BACKEND", "etcd"),
        os.environ.get("DYN_REQUEST_PLANE", "tcp"),
        os.environ.get("DYN_EVENT_PLANE"),
    )
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, runtime.shutdown)
    endpoint = runtime.endpoint(f"{config.namespace}.{config.component}.generate")
    metrics = FailoverMetrics(
        config.engine_id, config.served_model_name, Path(config.lock_path).parent, config.component
    )
    if config.knobs.metrics:
        endpoint.metrics.register_prometheus_expfmt_callback(metrics.text)
    metrics.enter("init")

    log.info("[GMS] Failover enabled: will use scratch KV for initialization until engine is primary")
    host = config.master_addr if config.several_nodes else "127.0.0.1"
    group: Leader | Peer
    if config.first_replica:
        group, port = Peer(config.workers + config.first_replica, config.meeting_secret), config.master_port
    else:
        group = Leader(config.workers, config.meeting_secret, config.replicas if config.hybrid else 0)
        port = await _listen(group, host, config)
    workers = Workers(config, host, port)
    kept = litter.leave() if config.knobs.litter else None
    watching = loop.create_task(_watch(workers, config.knobs.monitor_seconds))
    if isinstance(group, Peer):
        await group.join(host, port)
    await group.everybody()
    await group.some(config.own_workers, op="load")
    engine = Engine(config, group, metrics)
    engine.endpoint = endpoint
    runtime.register_engine_route("control/sleep", engine.route_sleep)
    runtime.register_engine_route("control/wake_up", engine.route_wake)

    burden = lock.burden(config.knobs.dying_gib)
    await engine.sleep()
    metrics.enter("standby")
    runtime.set_health_status(True)
    log.info("[Shadow] Engine sleeping, startup probe now passing, waiting for lock")
    config.knobs.fail_here("parked", config.tag)
    lock_fd, contended = await lock.acquire(config.lock_path, config.engine_id, config.knobs.lock_poll_seconds)
    if config.knobs.stray:
        lock.leave_a_stray(config.knobs.stray, lock_fd, config.tag)
    keeper = lock.hand_to_child(lock_fd) if burden else None
    log.info("Failover lock acquired: engine-%d", config.engine_id)
    log.info("[Shadow] Lock acquired, waking engine")
    metrics.enter("waking")
    if contended:
        metrics.count("attempts")
    await engine.wake()
    log.info("[Shadow] Engine awake, registering with discovery")

    limits = llm.ModelRuntimeConfig()
    limits.max_num_seqs = 64
    limits.total_kv_blocks = 1024
    limits.data_parallel_size = len(config.own_replicas)
    if config.hybrid:
        limits.data_parallel_start_rank = config.first_replica
    surface, kind = _registered_as(config.mode)
    await llm.register_model(
        llm.ModelInput.Tokens,
        surface,
        endpoint,
        str(config.model),
        config.served_model_name,
        kv_cache_block_size=16,
        runtime_config=limits,
        **kind,
    )
    metrics.enter("active")
    if contended:
        metrics.count("success")
    config.knobs.fail_here("serving", config.tag)
    await endpoint.serve_endpoint(
        engine.generate,
        health_check_payload={
            "token_ids": [1],
            "stop_conditions": {"max_tokens": 1},
            "annotations": [handover.ALONE],
        },
    )
    log.info("Last endpoint completed")
    config.knobs.fail_here("unregistered", config.tag)
    watching.cancel()
    workers.stop()
    if keeper is not None:
        keeper.communicate()
    else:
        os.close(lock_fd)
    del kept


async def _listen(group: Leader, host: str, config: EngineConfig) -> int:
    """Open the master port; where it is taken and all workers are ours, any other does, and who has watched for the
    number on our command line gains nothing. Raises `OSError`.
    """
    try:
        return await group.listen(host, config.master_port)
    except OSError as exc:
        if config.several_nodes:
            raise
        log.warning("%s; the workers of this node meet at another port", exc)
        return await group.listen(host, 0)


def _registered_as(mode: str) -> tuple[Any, dict[str, Any]]:
    """What the model is offered for, and as which part of a request's way: as dynamo.vllm says it."""
    from dynamo import llm

    surface = llm.ModelType.Prefill if mode == "prefill" else llm.ModelType.Chat | llm.ModelType.Completions
    if not hasattr(llm, "WorkerType"):  # named from 1.3 on
        return surface, {}
    if mode == "agg":
        return surface, {"worker_type": llm.WorkerType.Aggregated}
    one, other = llm.WorkerType.Prefill, llm.WorkerType.Decode
    return surface, dict(
        zip(("worker_type", "needs"), (one, [[other]]) if mode == "prefill" else (other, [[one]]), strict=True)
    )


async def _watch(workers: Workers, monitor_seconds: float) -> None:
    """A dead local worker means a dead engine, as upstream's engine monitor decides it when it looks next."""
    name, code = await workers.first_exit()
    log.error("Worker proc %s died unexpectedly (exit code %d), shutting down executor.", name, code)
    await asyncio.sleep(monitor_seconds)
    log.error("EngineDeadError: engine core is gone; exiting")
    os._exit(1)

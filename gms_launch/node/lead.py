"""The leader's part of the agent: what the controller is shown, and how its decisions are carried out.

Decides nothing: that is `cohort.controller`. What every node does, the leader's too, is in `agent`.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import NoReturn

from gms_launch.cohort import actions, controller, membership
from gms_launch.cohort.model import ENDED, Redundancy
from gms_launch.cohort.records import CommandRecord, CommandResult, DesiredCohort, RankRecord, Wanted
from gms_launch.cohort.view import KillRequest, Memory, Policy, Request, RollRequest, Slot, View
from gms_launch.engines.base import LOOPBACK
from gms_launch.errors import DeadlineError, LaunchError, by_code
from gms_launch.node import consent, herald
from gms_launch.node.gms_watch import DOWN
from gms_launch.node.group import Group
from gms_launch.node.node import Node
from gms_launch.observe import snapshot
from gms_launch.process import clock
from gms_launch.run import ports
from gms_launch.services.base import copied_excerpt, excerpt
from gms_launch.settings.declared import Settings

#: How long the agent of a node has to begin a drill (seconds).
DRILL_TIME = 10.0


def policy(settings: Settings) -> Policy:
    """What the settings say to the controller."""
    return Policy(
        cohorts=settings.cohorts,
        start_timeout=settings.start_timeout,
        promotion_timeout=settings.promotion_timeout,
        backoff=settings.restart_backoff,
        backoff_max=settings.restart_backoff_max,
        window=settings.restart_window,
        limit=settings.restart_limit,
        node_wait=settings.node_wait,
        group_kill=settings.group_kill,
        activate=settings.activation == "agent",
    )


def view(me: Group, now: float, heard_since: float = 0.0) -> View:
    """The run as the leader sees it `now`, who hears of the other nodes since `heard_since` (monotonic seconds)."""
    shot, nnodes = snapshot.build(me.mirror), me.layout.topology.nnodes
    slots = {}
    for c in shot.cohorts:
        desired = me.mirror.desired[c.cohort_id]
        slots[c.cohort_id] = Slot(
            cohort_id=c.cohort_id,
            incarnation=c.incarnation,
            running=desired.wanted is Wanted.RUNNING,
            given_up=c.given_up,
            phase=c.phase,
            since=me.sightings.since(c.cohort_id, c.incarnation, c.phase, now),
            exit=ended_by(desired, c.ranks),
            leftovers=tuple(pid for r in c.ranks for pid in r.leftovers),
            generation=desired.generation,
        )
    waiting = [
        c
        for c in me.mirror.commands.values()
        if c.verb in ("kill", "roll")
        and c.uuid not in me.mirror.results
        and c.uuid not in me.answered
        and me.claims.has(c)
        and consent.given(me, c)
    ]
    return View(
        slots=slots,
        confirmed=me.confirmed,
        requests=tuple(_request(c) for c in waiting),
        no_token=me.no_token,
        asked_since=me.asked_since,
        absent={
            r: node_name(me, r)
            for r in [*membership.missing(me.mirror.nodes, nnodes), *membership.unfit(me.mirror.nodes, nnodes)]
            if r != me.node_rank
        },
        lost=shot.lost,
        gms_down=tuple(
            membership.name(n)
            for n in shot.nodes
            if n.node_rank not in shot.lost and any(g.state == DOWN for g in n.gms)
        ),
        gms_restarting=any(n.gms_epoch < shot.gms_epoch for n in shot.nodes if n.node_rank not in shot.lost),
        heard_since=heard_since,
        lock_keeper=me.ranks.keeper,
        hung=me.canary.hung if me.canary is not None else {},
        generation=shot.generation,
        rolling=shot.rolling,
    )


def ended_by(desired: DesiredCohort, ranks: Iterable[RankRecord]) -> str:
    """How a life ended, for people: what it was killed for, where it was, and not the signal that we sent it."""
    said = next((r.exit for r in ranks if r.exit), "")
    for_what = desired.why if desired.wanted is Wanted.DEAD and desired.why != controller.RANK_ENDED else ""
    return for_what or said


def _request(command: CommandRecord) -> Request:
    if command.verb == "roll":
        return RollRequest(command.uuid, command.engine_args)
    return KillRequest(command.uuid, command.scope, command.force, command.to, command.cause)


def tell_refusals(me: Node) -> None:
    """Say which agents came to the run and did not fit. They ended; the run goes on as it was."""
    for key, text in me.mirror.refusals.items():
        if key not in me.answered:
            me.answered.add(key)
            me.report.emit("node_refused", detail=text)
            me.progress(f"an agent was refused: {text}")


def carry_out(me: Group, action: actions.Action) -> None:
    """Do what the controller decided."""
    match action:
        case actions.Start():
            _want(me, action.cohort_id, action.incarnation, Wanted.RUNNING, action.why)
        case actions.Kill():
            _want(me, action.cohort_id, action.incarnation, Wanted.DEAD, action.why)
        case actions.GiveUp():
            _give_up(me, action)
        case actions.KillPart():
            _kill_part(me, action)
        case actions.LoseNodes():
            _lose_nodes(me, action)
        case actions.NewGms():
            _new_gms(me, action)
        case actions.Answer():
            me.answered.add(action.uuid)
            result = CommandResult(action.ok, action.detail, action.cohort_id, action.incarnation, clock.now())
            me.report.put(me.mirror.keys.result(action.uuid), result.encode())
        case actions.Activate():
            _activate(me, action)
        case actions.Roll() | actions.Proved() | actions.RollBack():
            _roll(me, action)
        case actions.Abort():
            _abort(me, action)
        case _:
            nobody_does(action)


def nobody_does(action: NoReturn) -> NoReturn:
    """For the type checker: an action that nobody carries out is an error before anything runs."""
    raise AssertionError(f"no hand for {action!r}")


def _activate(me: Group, action: actions.Activate) -> None:
    """Have the agents of all nodes let go of the locks that a life's ranks wait for, ours at once."""
    record = replace(me.mirror.desired[action.cohort_id], serve=True)
    me.mirror.desired[action.cohort_id] = record
    me.report.put(me.mirror.keys.cohort(action.cohort_id), record.encode())
    me.wake.set()


def _give_up(me: Group, action: actions.GiveUp) -> None:
    me.report.emit("given_up", action.cohort_id, action.incarnation, action.why)
    me.progress(
        f"cohort {action.cohort_id} is given up: {action.why}{_log_of(me, action.cohort_id)}\n  another try "
        f"when no start has failed for {me.settings.restart_window:g} s (restart_window)"
    )
    _want(me, action.cohort_id, action.incarnation, Wanted.DEAD, action.why, given_up=True)


def _kill_part(me: Group, action: actions.KillPart) -> None:
    """Ask the agent of one node to kill its rank: a drill."""
    part = f"rank:{action.node_rank}"
    drill = CommandRecord(uuid.uuid4().hex, "kill-rank", clock.now(), action.cohort_id, action.incarnation, part)
    me.mirror.commands[drill.uuid] = drill
    if action.node_rank == me.node_rank:
        me.claims.own(drill)
    me.report.put(me.mirror.keys.command(drill.uuid), drill.encode(), me.report.lease)
    me.spawn(_withdraw(me, drill.uuid))
    me.wake.set()


def _lose_nodes(me: Group, action: actions.LoseNodes) -> None:
    known = me.mirror.run.lost if me.mirror.run else ()
    for rank in sorted(set(action.lost) ^ set(known)):
        kind = "node_lost" if rank in action.lost else "node_back"
        me.report.emit(kind, detail=node_name(me, rank))
        waits = f"is lost; {me.settings.node_wait:g} s of node_wait left for it to come back"
        me.progress(f"{node_name(me, rank)} {waits if rank in action.lost else 'is back'}")
    me.report.run(lost=action.lost)
    me.wake.set()


def _new_gms(me: Group, action: actions.NewGms) -> None:
    epoch = (me.mirror.run.gms_epoch if me.mirror.run else 0) + 1
    me.report.emit("gms_restart", detail=action.why)
    me.progress(f"{action.why}: starting new GMS servers on all nodes, and then the cohorts cold")
    me.report.run(gms_epoch=epoch)
    me.wake.set()


def _roll(me: Group, action: actions.Roll | actions.Proved | actions.RollBack) -> None:
    """Note with which arguments lives are started from now on."""
    run = me.mirror.run
    assert run is not None, "the leader says what the run is"
    match action:
        case actions.Roll():
            args = run.engine_args if action.engine_args is None else action.engine_args
            me.report.emit("roll", detail=f"generation {run.generation + 1}: {_words(me, args)}")
            me.progress(f"roll: shadows are started again with {_words(me, args)}")
            me.report.run(
                engine_args=args, engine_args_before=run.engine_args, generation=run.generation + 1, rolling=True
            )
        case actions.Proved():
            me.report.emit("roll_proved", action.cohort_id, action.incarnation, f"generation {run.generation}")
            me.report.run(rolling=False)
        case actions.RollBack():
            why = f"cohort {action.cohort_id} did not start with {_words(me, run.engine_args)}: {action.why}"
            me.report.emit("rolled_back", action.cohort_id, action.incarnation, action.why)
            me.progress(f"rolled back: {why}{_log_of(me, action.cohort_id)}")
            me.report.run(engine_args=run.engine_args_before, generation=run.generation - 1, rolling=False)
        case _:
            nobody_does(action)
    me.wake.set()


def tell_tries(me: Group, memory: Memory, policy: Policy, now: float) -> None:
    """Write down which slots' starts fail, so that everybody sees what is waited for. `now` in monotonic seconds."""
    for cohort_id, desired in me.mirror.desired.items():
        t = controller.tries(cohort_id, memory, policy, now)
        moment = t.not_before + clock.OFFSET if t.not_before else 0.0
        record = replace(desired, failed_starts=t.failed, start_limit=t.limit, last_exit=t.last_exit, next_start=moment)
        if record != desired:
            me.mirror.desired[cohort_id] = record
            me.report.put(me.mirror.keys.cohort(cohort_id), record.encode(), later=True)


def _words(me: Group, args: tuple[str, ...] | None) -> str:
    """Engine arguments for people; None are those of the settings."""
    return shlex.join(me.settings.engine_args if args is None else args) or "no engine arguments"


def tell_peers(me: Node) -> None:
    """Let all nodes know where each of them hears the word of a life's end."""
    if me.layout.topology.nnodes == 1:
        return
    record = herald.peers_of(me.mirror.nodes.values(), me.mirror.peers)
    if record != me.mirror.peers:
        me.mirror.peers = record
        me.report.say(me.mirror.keys.peers, record.encode())


async def _withdraw(me: Group, uuid: str) -> None:
    """A drill that was not begun by then is not to be: its agent may have stood still, and the run has gone on."""
    await asyncio.sleep(DRILL_TIME)
    me.mirror.commands.pop(uuid, None)
    me.report.delete(me.mirror.keys.command(uuid))


def _want(me: Group, cohort_id: int, incarnation: int, wanted: Wanted, why: str, given_up: bool = False) -> None:
    """Write down what is wanted of a slot; ours takes effect at once, the others see it in etcd."""
    current = me.mirror.desired.get(cohort_id)
    port = current.master_port if current and current.incarnation == incarnation else 0
    if wanted is Wanted.RUNNING:
        port = _master_port(me, cohort_id, incarnation)
        me.report.delete(me.mirror.keys.life_ended(cohort_id, incarnation - 1))  # fenced: nobody has to hear it
    run = me.mirror.run
    args, generation = (run.engine_args, run.generation) if run is not None else (None, 0)
    if wanted is Wanted.DEAD and current is not None:
        args, generation = current.engine_args, current.generation  # of the life that ends
    address = me.layout.topology.address
    record = DesiredCohort(cohort_id, incarnation, wanted, port, why, given_up, args, generation, address)
    me.mirror.desired[cohort_id] = record
    # A life that is ending anyway needs no word of ours to end.
    rank = me.ranks.find(cohort_id, incarnation)
    ending = wanted is Wanted.DEAD and rank is not None and rank.phase in ENDED
    me.report.put(me.mirror.keys.cohort(cohort_id), record.encode(), later=ending)
    me.wake.set()


def _master_port(me: Group, cohort_id: int, incarnation: int) -> int:
    """Where the ranks of a life meet; what it has instead of the slot's own range is told."""
    own, dp = me.layout.ports, me.layout.settings.dp
    wanted = own.master(cohort_id, incarnation)
    try:
        # Engines of one node meet on the latter.
        port = ports.meeting(own, cohort_id, incarnation, dp, me.layout.topology.address, LOOPBACK)
    except OSError:
        return wanted
    first = own.master(cohort_id, 1)
    if not first <= port < first + ports.INCARNATION_STEPS:
        taken = f"master ports {first} to {first + ports.INCARNATION_STEPS - 1} are in use: this life has another"
        me.report.emit("port_taken", cohort_id, incarnation, taken)
    return port


def _abort(me: Group, action: actions.Abort) -> None:
    """End the run, with the log of the rank that is to blame."""
    text = action.why
    if action.cohort_id >= 0:
        text = f"cohort {action.cohort_id} did not come up: {action.why}{_log_of(me, action.cohort_id)}"
    error = DeadlineError(text) if action.late else LaunchError(text)
    if me.layout.group:
        end(me, error, action.why)
    else:
        me.fail(error)


def end(me: Group, error: LaunchError, why: str = "") -> None:
    """End a group for good, `why` in short. At a first start the run ends of it, and says all of it then."""
    text = str(error)
    me.progress(f"this group is over: {text.partition(chr(10))[0] if me.memory.initial else text}")
    me.report.emit("group_over", detail=why or text)
    me.report.run(failed=text, exit_code=error.exit_code, redundancy=Redundancy.DOWN.value)
    me.wake.set()


def end_failed(me: Group) -> bool:
    """End a group that a node of it cannot go on with; says whether there is one."""
    for node in me.mirror.nodes.values():
        if node.failed and not node.stopping:
            end(me, by_code(node.exit_code, f"{membership.name(node)}: {node.failed}"))
            return True
    return False


def _log_of(me: Group, cohort_id: int) -> str:
    """Where the log is of the rank that is to blame, and what it says.

    The rank that died by itself, on whichever node, has the reason in its log; the others were killed for it.
    """
    records = [r for (c, _), r in sorted(me.mirror.ranks.items()) if c == cohort_id and r.log]
    ended = [r for r in records if r.exit]
    first = min(ended, key=lambda r: (r.exit.startswith("killed by SIGKILL"), r.since), default=None)
    found = first or next(iter(records), None)
    if found is None:
        return ""
    path = me.layout.logs_of(found.node_rank) / os.path.basename(found.log)
    here = me.ranks.said(found)
    text = copied_excerpt(path) if here is None else excerpt(here)  # another node's is on the shared home
    return f"\n  log: {path}\n{text}"


def node_name(me: Group, node_rank: int) -> str:
    """A node of the group for people, also when it is gone."""
    node = me.mirror.nodes.get(node_rank) or me.report.seen.get(node_rank)
    return membership.name(node) if node is not None else f"node {node_rank}"

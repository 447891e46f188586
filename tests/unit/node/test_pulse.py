"""When a rank that is alive is taken for hung: by its silence, by SIGSTOP, or by no token when one was asked for."""

from __future__ import annotations

from gms_launch.engines.signals import Health, Signals
from gms_launch.node.canary import TokenClock
from gms_launch.node.pulse import Look, Pulse


def test_the_pulse_of_a_rank() -> None:
    silent, here = Look(Signals(Health())), Look(Signals(Health(healthy=False)))
    pulse = Pulse(10.0)
    assert [pulse.judge(silent, t) for t in (0.0, 100.0)] == ["", ""], "it is starting, and has never answered"
    assert pulse.judge(here, 101.0) == ""
    assert [pulse.judge(silent, t) for t in (102.0, 111.9)] == ["", ""]
    assert pulse.judge(here, 112.0) == "", "one answer is enough"
    assert [pulse.judge(silent, t) for t in (113.0, 122.9)] == ["", ""]
    assert "no answer on its system port for 10 s" in pulse.judge(silent, 123.0)
    headless = Pulse(10.0)
    assert headless.judge(Look(), 0.0) == ""
    assert headless.judge(Look(stopped=(7,)), 1.0) == ""
    assert headless.judge(Look(), 5.0) == "", "it was let go"
    assert headless.judge(Look(stopped=(7,)), 6.0) == ""
    assert "process 7 has been stopped for 10 s" in headless.judge(Look(stopped=(7,)), 16.0)


def test_tokens_that_come_slowly_are_no_hang_and_none_at_all_is_one_only_when_asked_for() -> None:
    clock = TokenClock(interval=10.0, timeout=60.0, since=0.0)
    for t in range(0, 3000, 50):
        clock.counted(float(t), float(t))
        assert not clock.hung(float(t) + 49.9), "a token every 50 s"
    idle = TokenClock(interval=10.0, timeout=60.0, since=0.0)
    idle.counted(5.0, 0.0)
    idle.counted(5.0, 500.0)
    assert idle.due(500.0) and not idle.hung(500.0), "nobody has asked"
    idle.failed += 1
    assert idle.hung(500.0)
    idle.token(501.0)
    assert not idle.hung(561.0)


def test_how_long_no_token_came_is_known_to_a_look() -> None:
    clock = TokenClock(5.0, 30.0, 0.0)
    for now, tokens in ((1.0, 7.0), (2.0, 7.0), (3.0, 9.0), (4.0, 9.0)):
        clock.counted(tokens, now)
    assert clock.after == 2.0, "the last token came between the looks at 2 and at 3"

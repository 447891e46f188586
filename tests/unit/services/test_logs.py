"""What an error message shows of a log."""

from __future__ import annotations

from pathlib import Path

from gms_launch.services.base import first_traceback, log_excerpt

#: In the form of vLLM's log when its engine core cannot start: the cause first, then what fell over because of it.
ENGINE_LOG = """\
INFO 11-02 10:00:01 [model.py:5] Using max model len 2048
(EngineCore_DP0 pid=71) ERROR 11-02 10:00:40 [core.py:1074] EngineCore failed to start.
(EngineCore_DP0 pid=71) ERROR 11-02 10:00:40 [core.py:1074] Traceback (most recent call last):
(EngineCore_DP0 pid=71) ERROR 11-02 10:00:40 [core.py:1074]   File "/x/core.py", line 1065, in run_engine_core
(EngineCore_DP0 pid=71) ERROR 11-02 10:00:40 [core.py:1074]     engine_core = EngineCoreProc(*args)
(EngineCore_DP0 pid=71) ERROR 11-02 10:00:40 [core.py:1074] ModuleNotFoundError: No module named 'flashinfer'
INFO 11-02 10:00:41 [launcher.py:9] Shutting down
Traceback (most recent call last):
  File "/x/main.py", line 3, in main
    run()
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_first_traceback_is_the_cause() -> None:
    found = first_traceback(ENGINE_LOG.splitlines())
    assert len(found) == 4
    assert found[0].endswith("Traceback (most recent call last):")
    assert found[-1].endswith("ModuleNotFoundError: No module named 'flashinfer'")


def test_a_plain_traceback_and_a_long_one() -> None:
    plain = ["starting", "Traceback (most recent call last):", '  File "a", line 1', "    f()", "ValueError: no", "bye"]
    assert first_traceback(plain) == plain[1:5]
    long = ["Traceback (most recent call last):", *["  deeper"] * 500, "RecursionError: too deep", "after"]
    found = first_traceback(long)
    assert found[0] == long[0] and found[-1] == "RecursionError: too deep" and len(found) < 50


def test_without_a_traceback_the_end_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("\n".join(str(n) for n in range(100)))
    assert log_excerpt(log).splitlines() == [f"  | {n}" for n in range(85, 100)]
    log.write_text(ENGINE_LOG)
    assert "flashinfer" in log_excerpt(log) and "See root cause" not in log_excerpt(log)
    assert "(no log" in log_excerpt(tmp_path / "none")
    log.write_text("")
    assert "empty" in log_excerpt(log)

"""Whatever is given as settings, `resolve` and `plan` answer with a plan or with one of our errors."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gms_launch.cli import main as command_line
from gms_launch.cli import plan
from gms_launch.errors import LaunchError
from gms_launch.settings.declared import BY_NAME, SETTINGS, Settings
from gms_launch.settings.resolve import resolve

URLS = ("http://u:p@h:1", "nats://u:p@h:1", "http://[::1")
HOSTS = ("127.0.0.1", "10.0.0.1", "localhost", "[::1", "::1", "a[1-9", "../..")
ODD = ("", " ", "0", "-1", "1e308", "inf", "٣", "a\0b", "\udcff", "a" * 5000, "{tp}", "%s", "true", "command", "auto")
NASTY = st.sampled_from([*URLS, *HOSTS, *ODD])
TEXT = st.one_of(NASTY, st.text(max_size=20), st.integers(-5, 70000).map(str), st.floats().map(str))
VALUE = st.one_of(
    TEXT,
    st.integers(-5, 70000),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.lists(st.integers(), max_size=2),
    st.dates(),
)
NAMES = st.sampled_from([s.name for s in SETTINGS])
WORDS = st.one_of(
    st.sampled_from(
        ["--model", "-tp", "--t", "-n1", "--kv-events-config", '{"endpoint": 1}', "--dtype=auto", "--", "-"]
    ),
    TEXT,
)
#: Of flags, most are harmless, so that much is planned: None stands for the default, said aloud.
FLAGS = st.dictionaries(NAMES, st.one_of(st.none(), st.none(), st.none(), TEXT), max_size=5)
ENVIRON = st.dictionaries(
    st.one_of(
        NAMES.map(lambda n: BY_NAME[n].env), NAMES.map(lambda n: BY_NAME[n].recipe or "X"), st.just("GMS_LAUNCH_X")
    ),
    TEXT,
    max_size=3,
)
TABLE = st.dictionaries(st.one_of(NAMES, st.text(max_size=5)), VALUE, max_size=3)


def planned(given: Settings, as_json: bool) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        plan.main(given, 0, as_json)
    if as_json:
        json.loads(said.getvalue())


def complaint(of: Callable[[], object]) -> LaunchError | None:
    """The error of ours that comes out; any other goes on."""
    try:
        of()
    except LaunchError as exc:
        return exc
    return None


@settings(max_examples=2000, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(FLAGS, ENVIRON, TABLE, st.lists(WORDS, max_size=3), st.booleans())
@example({"nnodes": "2", "leader_addr": "10.0.0.1"}, {}, {}, [], True)
@example({"hosts": "a[1-3]"}, {}, {}, [], False)
def test_only_our_own_errors_come_out(
    model: Path, flags: dict[str, Any], environ: dict[str, str], toml: dict[str, Any], words: list[str], as_json: bool
) -> None:
    flags = {name: text if text is not None else str(BY_NAME[name].default) for name, text in flags.items()}
    if (refused := complaint(lambda: resolve(flags, environ, toml, engine_args=words))) is not None:
        assert refused.exit_code == 2
        assert "\n" not in str(refused) and len(str(refused)) < 2000
        return
    # What is right by itself is planned, for a model that there is.
    flags = {**flags, "model": str(model), "engine": "reference", "tp": flags.get("tp") or flags.get("nnodes") or "1"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GMS_LAUNCH_", "SLURM_"))}
    unknown = mock.patch("socket.getaddrinfo", side_effect=socket.gaierror(-2, "not asked"))
    with mock.patch.dict(os.environ, clean, clear=True), unknown:
        refused = complaint(lambda: planned(resolve(flags, environ, toml, engine_args=words), as_json))
    assert refused is None or refused.exit_code in (2, 3)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (
            ValueError("what was it"),
            1,
            r"met an error that it does not know: ValueError: what was it; its traceback is in ",
        ),
        (OSError(28, "No space left on device", "/x"), 1, r"OSError: \[Errno 28\] No space left on device: '/x'; its"),
        (RecursionError("deep"), 1, r"RecursionError: deep; its traceback"),
        (KeyboardInterrupt(), 130, r"\A\Z"),
    ],
)
def test_what_nobody_has_foreseen_is_one_message_that_names_the_traceback(
    error: BaseException,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["gms-launch", "status", "--run", "nats://u:secret@h"])
    monkeypatch.setattr("gms_launch.cli.status.main", mock.Mock(side_effect=error))
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    text = capsys.readouterr().err
    assert caught.value.code == code
    assert re.search(says, text) and "Traceback" not in text and text.count("\n") == (1 if text else 0), text
    files = list(tmp_path.iterdir())
    assert len(files) == (1 if "traceback" in says else 0) or says.endswith("its")
    for file in files:
        assert str(file) in text and "Traceback" in file.read_text() and file.stat().st_mode & 0o777 == 0o600

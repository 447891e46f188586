"""The pages of a live run; and the timeline in a real browser, in the light, in the dark and on paper."""

from __future__ import annotations

import http.client
import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from pathlib import Path

import pytest

from gms_launch.cohort.failover import fold
from gms_launch.observe import journal, markup, pages
from tests.support import GMS_LAUNCH, Deployment, eventually

RECORDED = Path(__file__).parents[1] / "unit" / "observe" / "failovers.jsonl"
BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


def test_the_pages_of_a_live_run_follow_it(model: Path, tmp_path: Path) -> None:
    with Deployment(tmp_path / "home", model) as run:
        web = subprocess.Popen([*GMS_LAUNCH, "web", "--run", run.run], env=run.env, stdout=subprocess.PIPE, text=True)
        try:
            assert web.stdout is not None
            found = re.search(r"http://127.0.0.1:(\d+)(/\S+/)", web.stdout.readline())
            assert found

            def page(name: str) -> str:
                connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
                connection.request("GET", found[2] + name)
                return connection.getresponse().read().decode()

            run.wait_full()
            eventually(lambda: f"<h1>run {run.run}: full</h1>" in page(""))
            pids = [str(r["pid"]) for c in run.status()["cohorts"] for r in c["ranks"]]
            assert pids and all(f'<td class="number">{pid}</td>' in page("") for pid in pids)
            assert "There has been none." in page("timeline")
            done = run.cli("kill-primary")
            assert done.returncode == 0, done.stderr
            eventually(lambda: 'id="failover-1"' in page("timeline"))
            file = tmp_path / "status.html"
            assert run.cli("status", "--html", str(file)).returncode == 0
            assert f"<h1>run {run.run}: " in file.read_text()
            assert run.cli("down").returncode == 0
            eventually(lambda: f"run {run.run} is not up" in page(""))
            assert "It ended at " in page("timeline")
        finally:
            web.kill()
            web.wait()


def colours(png: bytes) -> Counter[str]:
    """How often each colour is in a picture of 8 bits a channel, which is what a browser's screenshot is."""
    at, data, width, channels = 8, b"", 0, 0
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, _, depth, colour = struct.unpack(">IIBB", body[:10])
            assert depth == 8
            channels = {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            data += body
        at += 12 + size
    raw, wide, before = zlib.decompress(data), width * channels, bytes(width * channels)
    found: Counter[str] = Counter()
    for start in range(0, len(raw), wide + 1):
        kind, line = raw[start], bytearray(raw[start + 1 : start + 1 + wide])
        for k in range(wide if kind else 0):
            left, up = (line[k - channels] if k >= channels else 0), before[k]
            corner = before[k - channels] if k >= channels else 0
            near = min((left, up, corner), key=lambda v, p=left + up - corner: abs(p - v))  # type: ignore[misc]
            line[k] = (line[k] + (0, left, up, (left + up) // 2, near)[kind]) & 255
        before = bytes(line)
        found.update(before[k : k + 3].hex() for k in range(0, wide, channels))
    return found


def variables(part: str) -> dict[str, str]:
    return dict(re.findall(r"--(\w+): #(\w+);", part))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium (apt-get install chromium-headless-shell: 64 MB)")
def test_the_timeline_in_a_browser(tmp_path: Path) -> None:
    events = journal.read(RECORDED)
    story = pages.Story("r1", 3, events[0].time, events[-1].time, "", events, fold(events, 3))
    page = tmp_path / "page.html"
    page.write_text(pages.timeline(story, events[-1].time))

    def browse(*flags: str) -> str:
        own = [f"--user-data-dir={tmp_path / 'profile'}", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        argv = [str(BROWSER), "--headless", *own, "--window-size=1280,1500", "--enable-logging=stderr", *flags]
        done = subprocess.run([*argv, page.as_uri()], capture_output=True, text=True, timeout=110, check=True)
        assert "CONSOLE" not in done.stderr, done.stderr  # what its policy forbids a page is told there
        return done.stdout

    light, dark = markup.STYLE.split("prefers-color-scheme: dark")
    for name, flags, known in (
        ("light", [], variables(light)),
        ("dark", ["--blink-settings=preferredColorScheme=0"], variables(light) | variables(dark)),
    ):
        file = tmp_path / f"{name}.png"
        browse(f"--screenshot={file}", *flags)
        seen = colours(file.read_bytes())
        assert seen.most_common(1)[0][0] == known["ground"], name
        for colour in ("good", "shadow", "waking", "dying", "none", "silence"):
            assert seen[known[colour]] > 100, f"{name}: {colour} is not drawn"
    paper = tmp_path / "paper.pdf"
    browse("--no-pdf-header-footer", f"--print-to-pdf={paper}", "--blink-settings=preferredColorScheme=0")
    sheets = re.findall(rb"/Type\s*/Page\b", paper.read_bytes())
    assert 4 <= len(sheets) <= 12

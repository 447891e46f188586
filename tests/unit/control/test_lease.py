"""A lease is kept as long as the server answers at all."""

from __future__ import annotations

import queue
import threading
import time

from gms_launch.control.lease import LeaseKeeper
from tests.support import PATIENCE


class Busy:
    """A server that takes its time where a connection stands, and none for another's handshake."""

    def __init__(self) -> None:
        self.refused = threading.Event()

    def refresh(self, lease: int, timeout: float) -> bool:
        if timeout <= 0.5:
            raise TimeoutError
        assert self.refused.wait(PATIENCE)
        return True

    def refresh_anew(self, lease: int, number: int, timeout: float) -> bool:
        self.refused.set()
        raise ConnectionError


def test_a_renewal_over_the_connection_that_stands_counts_however_late() -> None:
    renewed, lost = queue.Queue[float](), list[str]()
    began = time.monotonic()
    keeper = LeaseKeeper(Busy(), 0.6, lambda _: None, lost.append, renewed.put, 7, began)  # type: ignore[arg-type]
    keeper.start()
    sent = [renewed.get(timeout=PATIENCE) for _ in range(3)]
    keeper.stop()
    assert lost == [] and sent[0] == began < sent[1] < sent[2]

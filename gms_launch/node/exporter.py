"""The metrics of this node at work: fed with what the agent sees, and served if somebody wanted that.

With `metrics_port` 0 nothing is loaded and nothing listens. That they cannot be served is told and borne.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gms_launch.node.reporter import Reporter
from gms_launch.node.session import Session
from gms_launch.run import parts
from gms_launch.run.plan import Layout

if TYPE_CHECKING:
    from gms_launch.observe.metrics import Metrics
    from gms_launch.observe.scrape import Server
    from gms_launch.observe.snapshot import Snapshot

#: `metrics_host` for the address of this node in the run.
NODE = "node"


class Exporter:
    """Serves this node's metrics; `address` is where, empty when nobody can ask."""

    def __init__(self, layout: Layout, report: Reporter) -> None:
        self._layout, self._report = layout, report
        self._server: Server | None = None
        self.metrics: Metrics | None = None
        self.address = ""

    def start(self, session: Session) -> None:
        """Begin to serve, as the settings say."""
        settings, place = self._layout.settings, self._layout.topology
        if not settings.metrics_port:
            return
        from gms_launch.observe import metrics, scrape

        host = place.address if settings.metrics_host == NODE else settings.metrics_host
        try:
            listening = scrape.listen(host, settings.metrics_port)
        except OSError as exc:
            where, why = f"{host} port {settings.metrics_port}", exc.strerror
            self._report.emit(
                "metrics_unserved", detail=f"{where}: {why}; the run goes on without metrics of this node"
            )
            return
        self.metrics = made = metrics.Metrics(
            place.node_rank,
            place.nnodes,
            settings.engine,
            {p.group.name: len(p.nodes) for p in parts.placed(self._layout)} if settings.grouped else {},
            session.lease_left,
            lambda: server.soon(made.settle),
        )
        self._server = server = scrape.Server(listening, made.page, metrics.CONTENT_TYPE)
        self._report.listeners.append(made.take)
        server.start()
        reached = place.address if host in ("", "0.0.0.0", "::") else host
        self.address = (
            f"[{reached}]:{settings.metrics_port}" if ":" in reached else f"{reached}:{settings.metrics_port}"
        )

    def look(self, shot: Snapshot) -> None:
        """The state of the run as this node sees it now."""
        if self.metrics is not None:
            self.metrics.look(shot)

    def stop(self) -> None:
        """End with the agent. Blocks for a second at most."""
        if self._server is not None:
            self._server.stop()

"""`python -m gms_launch.engines.reference`: one rank of the reference engine."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import sys

from gms_launch.engines.reference import args

log = logging.getLogger("reference")


async def headless(config: args.EngineConfig) -> None:
    """A rank above 0: workers only, no runtime, no lock. Returns, with exit code 0, when one of them dies."""
    from gms_launch.engines.reference.spawn import Workers

    workers = Workers(config, config.master_addr, config.master_port)
    name, code = await workers.first_exit()
    log.error("Worker proc %s died unexpectedly (exit code %d), shutting down executor.", name, code)


def main() -> None:
    config = args.parse(sys.argv[1:], os.environ)
    importlib.import_module("gms_launch.engines.reference.burden")
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s (Engine_{config.engine_id} pid={os.getpid()}) %(levelname)s %(message)s",
        stream=sys.stdout,
    )
    if config.headless:
        asyncio.run(headless(config))
        return
    import uvloop

    from gms_launch.engines.reference.leader import run

    uvloop.run(run(config))


if __name__ == "__main__":
    main()

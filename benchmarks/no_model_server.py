"""A server whose model costs nothing, to measure what everything around a forward costs.

A row's score is its first dense value. The engine, its lanes and the transport are those of ``narsil serve``.
"""

from __future__ import annotations

import argparse
import asyncio
import signal

import numpy as np

from narsil.artifacts.schema import ModelSchema
from narsil.backends.base import Backend
from narsil.catalog.manager import ModelManager
from narsil.config import load_settings
from narsil.dataflow import Batch, Scores
from narsil.engine.engine import Engine
from narsil.engine.scheduler import BatchPolicy
from narsil.engine.served_model import ServedModel
from narsil.packaging.dlrm import DlrmConfig
from narsil.server import make_transport, prepare_process, settle_process


class NoModel(Backend):
    """Gives back the first dense value of each row."""

    name = "none"
    device = "cpu"

    def __init__(self, schema: ModelSchema) -> None:
        self.schema = schema

    def run(self, batch: Batch) -> Scores:
        return {"default": np.ascontiguousarray(batch.dense[:, 0])}

    def share(self) -> NoModel:
        return self


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", choices=["auto", "native", "grpcio"], default="auto")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--lanes", type=int, default=2)
    arguments = parser.parse_args()
    prepare_process()
    given = {"model": "none", "transport": arguments.transport, "host": arguments.host, "port": 0}
    settings = load_settings(given)
    schema = DlrmConfig().schema
    engine = Engine(arguments.lanes, BatchPolicy(lanes=arguments.lanes))
    engine.start()
    models = ModelManager(engine)
    models.add(ServedModel("none", "1", [NoModel(schema)] * arguments.lanes))
    transport = make_transport(engine, settings)
    models.subscribe(transport.serve)
    settle_process()
    print(f"listening on {await transport.start()}", flush=True)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()
    await asyncio.to_thread(engine.drain, 5)
    await transport.stop(1)


if __name__ == "__main__":
    asyncio.run(main())

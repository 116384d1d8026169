"""The load generator: runs a load in a process of its own, so that neither its interpreter nor its memory is the
server's or the reporter's. What sends the requests is a driver, `driver_native` or `driver_grpcio`, chosen here.
"""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import numpy as np

from narsil.bench.load import ClientChoice, ClientName, Driver, Load, LoadError, OnProgress, Outcome, due_times
from narsil.bench.workload import score_reader
from narsil.errors import NarsilError


def choose_client(choice: ClientChoice, targets: Sequence[str] = ()) -> ClientName:
    """The client for all loads of a comparison: the native one where it is built and takes every target.

    Raises LoadError where the native one is asked for and cannot be had.
    """
    if choice == "grpcio":
        return choice
    problem = _native_problem(targets)
    if problem and choice == "native":
        raise LoadError(problem)
    return "grpcio" if problem else "native"


def _native_problem(targets: Sequence[str]) -> str:
    try:
        native = importlib.import_module("narsil._load")
    except ImportError as error:
        return (
            "the native client is not there; it needs a C++ compiler and libnghttp2-dev when Narsil is built, or take "
            f"--client grpcio ({error})"
        )
    for target in targets:
        if not native.is_target(target):
            return (
                f"{target} is none of HOST:PORT, [IPV6]:PORT and unix:PATH, which the native client takes; "
                "take --client grpcio"
            )
    return ""


def run_load(
    load: Load,
    on_measure: Callable[[], None] = lambda: None,
    on_progress: OnProgress = lambda done: None,
    on_measured: Callable[[], None] = lambda: None,
) -> Outcome:
    """Runs a load in a child process.

    ``on_measure`` is called when the warmup has ended and the measured part begins, ``on_measured`` when it has
    ended: the moments to read the server's CPU clock. Raises LoadError when the child fails.
    """
    client = choose_client(load.client, [load.target])
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, load, client), daemon=True)
    child.start()
    theirs.close()
    try:
        while True:
            kind, value = ours.recv()
            if kind == "measure":
                on_measure()
                ours.send("go")
            elif kind == "progress":
                on_progress(value)
            elif kind == "measured":
                on_measured()
            elif kind == "failed":
                raise LoadError(value)
            else:
                outcome: Outcome = value
                return outcome
    except EOFError:
        raise LoadError("the load generator died; see its message above") from None
    finally:
        child.join(10)
        if child.is_alive():
            child.kill()
        ours.close()


def _child(pipe: Connection, load: Load, client: ClientName) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; this process ends with it
    try:
        pipe.send(("outcome", _warm_up_and_measure(pipe, load, client)))
    except NarsilError as error:
        pipe.send(("failed", str(error)))
    except Exception as error:  # the parent reports it: this process has no console of its own
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


def _warm_up_and_measure(pipe: Connection, load: Load, client: ClientName) -> Outcome:
    def on_progress(done: int) -> None:
        pipe.send(("progress", done))

    driver = connect(load, client)
    try:
        warm = driver.closed_loop(load.warmup, load.concurrency, lambda done: None)
        if load.warmup and sum(warm.errors.values()) == load.warmup:
            raise LoadError(f"every warmup request failed: {warm.errors}")
        due = None if load.rate is None else due_times(load, load.rate)
        pipe.send(("measure", None))
        pipe.recv()
        cpu, began = time.process_time(), time.perf_counter()
        if due is None:
            part = driver.closed_loop(load.requests, load.concurrency, on_progress)
        else:
            part = driver.open_loop(due, on_progress)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        pipe.send(("measured", None))
    finally:
        driver.close()
    readers = [score_reader(load.protocol, task) for task in load.workload.schema.tasks]
    replies = {**warm.replies, **part.replies}
    scores = {body: np.concatenate([read(reply) for read in readers]) for body, reply in replies.items()}
    return Outcome(part.latencies, part.errors, wall, cpu, scores, part.late_s, client)


def connect(load: Load, client: ClientName) -> Driver:
    """A driver for a load, connected to its server. Raises LoadError where none answers."""
    if client == "native":
        from narsil.bench.driver_native import NativeDriver

        return NativeDriver(load)
    from narsil.bench.driver_grpcio import GrpcioDriver

    return GrpcioDriver(load)

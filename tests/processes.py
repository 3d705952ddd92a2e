"""Real processes for tests of torch.distributed: workers, joined by gloo on loopback, that a test can call."""

import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

HOST = "127.0.0.1"
TIME_LIMIT = 120.0  # seconds for one run; against hanging, not a measure of speed
PATIENCE = 2.0  # seconds after the first failure for the others to fail too


class WorkerDiedError(Exception):
    """A worker ended without an answer. The message has its exit code, which is -9 after SIGKILL."""


class Workers(AbstractContextManager["Workers"]):
    """Processes that call functions together, as the ranks of a gloo process group.

    They start when first needed, and end with the `with` statement. A function must stand at the top of a module; its
    arguments and results are pickled (plain tensors are, DTensors are not). It finds a process group on a free port,
    which it must not destroy, and the environment of "env://", so that RPC finds the same store. Each process uses one
    thread; warnings raise, as in the tests.
    """

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returns in each of `count` processes, in the order of ranks.

        If it raises, RuntimeError has the traceback; if a worker dies, WorkerDiedError says so; after the time limit
        TimeoutError is raised. All workers are then killed, and the next run starts new ones.
        """
        # The store lives here and picks its own port, which nobody can take in between.
        store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        while len(self._workers) < count:
            self._workers.append(_start())
        try:
            for rank, (_, connection) in enumerate(self._workers[:count]):
                connection.send_bytes(pickle.dumps((function, arguments, rank, count, store.port)))
            return self._answers(count)
        except BaseException:
            self.close(patience=0.0)
            raise

    def close(self, patience: float = PATIENCE) -> None:
        """End all workers; kill those that still run after `patience` seconds."""
        for _, connection in self._workers:
            connection.close()  # an idle worker ends at that
        for process, _ in self._workers:
            process.join(patience)
            process.kill()
            process.join()
        self._workers = []

    def _answers(self, count: int) -> list[Any]:
        replies: dict[int, Any] = {}
        errors: list[Exception] = []
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers[:count])}
        end = time.monotonic() + TIME_LIMIT
        while waiting and (ready := wait(list(waiting), timeout=max(0.0, end - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    error, replies[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    process = self._workers[rank][0]
                    process.join(PATIENCE)
                    errors.insert(0, WorkerDiedError(f"Rank {rank} died with exit code {process.exitcode}."))
                else:
                    errors += [RuntimeError(f"Rank {rank} failed:\n{error}")] if error else []
                if errors:  # The first to answer may be one that lost its connection to the one at fault.
                    end = min(end, time.monotonic() + PATIENCE)
        if not errors and waiting:
            raise TimeoutError(f"No answer in time from ranks {sorted(waiting.values())}.")
        if errors:
            raise type(errors[0])("\n".join(map(str, errors)))
        return [replies[rank] for rank in range(count)]


def _start() -> tuple[Any, Connection]:
    context: Any = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()  # so that the death of the worker is an end of file here
    return process, here


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, TP_SOCKET_IFNAME=loopback, MASTER_ADDR=HOST)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # "env://" then joins the parent's store
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="You are using a Backend <class .*ProcessGroupGloo")  # init_rpc, in torch
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:  # the parent is gone
            return
        try:
            reply = pickle.dumps((None, _call(*pickle.loads(message))))
        except Exception:
            reply = pickle.dumps((traceback.format_exc(), None))
        connection.send_bytes(reply)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, count: int, port: int) -> Any:
    os.environ.update(MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    timeout = timedelta(seconds=TIME_LIMIT)
    store = dist.TCPStore(HOST, port, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()

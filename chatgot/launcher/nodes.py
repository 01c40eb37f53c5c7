"""launch/run on several nodes that somebody else starts (--nnodes): they start their ranks again together.

Node 0 has a torch TCPStore beside the rendezvous of the ranks, on the next port. When the ranks of a node have ended,
its launch/run leaves a report there; node 0 waits for all reports, decides, and leaves the plan of the next round.
Without --max_restarts there is nothing to agree on, and no store.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatgot.errors import EXIT_DONE, EXIT_ENVIRONMENT, ChatGoTError, MachineError
from chatgot.launcher.hosts import PORT, used_of
from chatgot.launcher.restarts import FINAL, Restarts
from chatgot.launcher.supervisor import say

MEET_MINUTES = 10.0
"""How long the nodes wait for each other at their start."""
LEAVE_SECONDS = 60.0
"""How long node 0 waits, when it ends, until the others know why."""
_TICK = 0.2


@dataclass(frozen=True)
class Plan:
    """Of one round."""

    attempt: str
    ranks: Mapping[str, int]
    """Ranks of each node, by its number; node 0 has rank 0."""
    code: int | None = None
    """What all end with; None: they start their ranks."""


class Nodes:
    """This node among the others. Signals are blocked, and looked for between two looks at the store."""

    def __init__(
        self, store: Any, arguments: argparse.Namespace, nproc: int, restarts: Restarts, out_dir: Path | None
    ) -> None:
        self._store = store
        self._node, self._all = arguments.node_rank, arguments.nnodes
        self._nproc, self._minutes = nproc, arguments.rejoin_minutes
        self._restarts, self._out_dir = restarts, out_dir
        self._round = -1
        self.plan = Plan("", {})

    @classmethod
    def meet(cls, arguments: argparse.Namespace, nproc: int, restarts: Restarts, out_dir: Path | None) -> Nodes:
        """Wait for the others, and take the plan of the first round.

        Raises:
            MachineError: they did not come, or node 0 did not.
        """
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        address, port, first = arguments.master_addr, (arguments.master_port or PORT) + 1, arguments.node_rank == 0
        deadline = time.monotonic() + 60 * MEET_MINUTES
        while not first:
            try:
                socket.create_connection((address, port), timeout=5).close()
                break
            except OSError as error:
                if time.monotonic() > deadline or signal.sigpending():
                    raise MachineError(f"node 0 is not there at {address}:{port}: {error.strerror or error}") from None
                time.sleep(1.0)
        try:
            store = TCPStore(address, port, is_master=first, wait_for_workers=False)
        except RuntimeError as error:
            raise MachineError(f"{address}:{port}, beside --master_port: {error}") from error
        nodes = cls(store, arguments, nproc, restarts, out_dir)
        if not first and store.check(["round"]):
            nodes._round = int(store.get("round")) - 1  # the others have begun; this node was started again
        nodes.agree(EXIT_ENVIRONMENT, False, False)
        return nodes

    @property
    def go_on(self) -> bool:
        """Whether this node starts ranks in this round."""
        return self.plan.code is None and self.ranks_here > 0

    @property
    def ranks_here(self) -> int:
        return self.plan.ranks.get(str(self._node), 0)

    @property
    def first_of_all(self) -> tuple[int, int]:
        """The first rank of this node, and how many there are."""
        before = sum(ranks for node, ranks in self.plan.ranks.items() if int(node) < self._node)
        return before, sum(self.plan.ranks.values())

    def agree(self, code: int, ran_out: bool, stopping: bool) -> int:
        """Report how the ranks of this node ended, and take the plan of the next round; returns what to end with.

        Args:
            code: of the launch/run of this node alone.
            ran_out: a rank has stored a smaller micro-batch.
            stopping: the user has sent this node a signal.
        """
        if code == EXIT_DONE and self._round >= 0:
            self.plan = Plan("", {}, EXIT_DONE)
            return code
        self._round += 1
        final = stopping or (code in FINAL and not ran_out)
        report = {"code": code, "nproc": self._nproc, "final": final, "ran_out": ran_out}
        try:
            self._store.set(f"report/{self._round}/{self._node}", json.dumps(report))
            self.plan = self._decided(code) if self._node == 0 else self._told()
        except RuntimeError as error:
            raise MachineError(
                f"node {self._node}: node 0's launch/run is gone: {str(error).splitlines()[0]}"
            ) from error
        if self.plan.code is None and not self.ranks_here:
            say(f"node {self._node} is not needed: the others go on without it")
            return EXIT_DONE
        return code if self.plan.code is None else self.plan.code

    def _decided(self, code: int) -> Plan:
        """Node 0: wait for the reports, and tell all what follows."""
        if self._round:
            self._store.set("round", str(self._round))
        reports = self._reports()
        finals = [report["code"] for report in reports.values() if report["final"]]
        missing = [f"node {node}" for node in range(self._all) if str(node) not in reports]
        slots = {node: report["nproc"] for node, report in reports.items()}
        plan = Plan(uuid.uuid4().hex, slots, finals[0] if finals else None)
        if not finals and self._round == 0:
            if missing:
                plan = Plan("", {}, EXIT_ENVIRONMENT)
        elif not finals and any(report["ran_out"] for report in reports.values()):
            say("all ranks start again with the smaller micro-batch")
        elif not finals and not self._restarts.another(code):
            plan = Plan("", {}, code)
        elif not finals:
            refusal: ChatGoTError | None = None
            try:
                named = {f"node {node}": ranks for node, ranks in slots.items()}
                used = used_of(named, missing, self._minutes, self._out_dir) if missing else named
                plan = Plan(plan.attempt, {name.removeprefix("node "): ranks for name, ranks in used.items()})
                self._restarts.announce()
            except MachineError as error:
                refusal, plan = error, Plan("", {}, EXIT_ENVIRONMENT)
            if refusal is not None:
                say(str(refusal))
        self._store.set(f"plan/{self._round}", json.dumps(asdict(plan)))
        told = reports if plan.code is None else map(str, range(self._all))  # some may still be about to report
        self._wait_for_readers(f"read/{self._round}/{node}" for node in told if node != "0")
        if self._round == 0 and missing:
            raise MachineError(f"{', '.join(missing)} did not come within {MEET_MINUTES:g} minutes")
        return plan

    def _reports(self) -> dict[str, dict[str, Any]]:
        """Those of all nodes, or of the ones that came in time; a final one or a signal ends the waiting."""
        deadline = time.monotonic() + 60 * (self._minutes if self._round else MEET_MINUTES)
        grace = time.monotonic() + LEAVE_SECONDS  # the others may still be noticing that their peers are gone
        while True:
            found: dict[str, dict[str, Any]] = {}
            for node in range(self._all):
                if self._store.check([key := f"report/{self._round}/{node}"]):
                    found[str(node)] = json.loads(self._store.get(key))
            over = time.monotonic() > max(deadline, grace if self._round else 0.0)
            if len(found) == self._all or over or signal.sigpending() or any(one["final"] for one in found.values()):
                return found
            time.sleep(_TICK)

    def _told(self) -> Plan:
        """Every other node: wait for what node 0 decides."""
        key = f"plan/{self._round}"
        while not self._store.check([key]):
            if signal.sigpending():
                return Plan("", {}, EXIT_ENVIRONMENT)
            time.sleep(_TICK)
        told = Plan(**json.loads(self._store.get(key)))
        self._store.set(f"read/{self._round}/{self._node}", "")
        return told

    def _wait_for_readers(self, keys: Iterable[str]) -> None:
        """The store ends with node 0's process, which may have little to do."""
        deadline, keys = time.monotonic() + LEAVE_SECONDS, list(keys)
        while keys and not self._store.check(keys) and time.monotonic() < deadline and not signal.sigpending():
            time.sleep(_TICK)

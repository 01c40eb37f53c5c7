"""launch/run on several nodes that somebody else starts (--nnodes): they start their ranks again together.

Node 0 has a torch TCPStore beside the rendezvous of the ranks, on the next port. When the ranks of a node have ended,
its launch/run leaves a report there; node 0 waits for all reports, decides, and leaves the plan of the next round.
Without --max_restarts there is nothing to agree on, and no store.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from chatgot.errors import EXIT_DONE, EXIT_ENVIRONMENT, MachineError
from chatgot.launcher.hosts import PORT, used_of
from chatgot.launcher.supervisor import FINAL, Restarts, say

MEET_MINUTES = 10.0
"""How long the nodes wait for each other at their start."""
LEAVE_SECONDS = 60.0
"""How long node 0 waits, when it ends, until the others know why."""
_TICK = 0.2


@dataclass(frozen=True)
class Plan:
    """Of one round."""

    attempt: str = ""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Ranks of each node, "node 0" first; it has rank 0."""
    code: int | None = None
    """What all end with; None: they start their ranks."""


class Nodes:
    """This node among the others. Signals are blocked, and looked for between two looks at the store."""

    def __init__(self, arguments: argparse.Namespace, nproc: int, restarts: Restarts, out_dir: Path | None) -> None:
        """Wait for the others, and take the plan of the first round.

        Raises:
            MachineError: they did not come, or node 0 did not.
        """
        self._name, self._all = f"node {arguments.node_rank}", [f"node {node}" for node in range(arguments.nnodes)]
        self._nproc, self._minutes = nproc, arguments.rejoin_minutes
        self._restarts, self._out_dir = restarts, out_dir
        self._round = -1
        self.plan = Plan()
        self._store = self._meet(arguments.master_addr, (arguments.master_port or PORT) + 1)
        if self._name != self._all[0] and self._store.check(["round"]):
            self._round = int(self._store.get("round")) - 1  # the others have begun; this node was started again
        self.agree(EXIT_ENVIRONMENT, False, False)

    def _meet(self, address: str, port: int) -> Any:
        """Make the store, or wait for that of node 0."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        first, deadline = self._name == self._all[0], time.monotonic() + 60 * MEET_MINUTES
        while not first:
            try:
                socket.create_connection((address, port), timeout=5).close()
                break
            except OSError as error:
                if time.monotonic() > deadline or signal.sigpending():
                    raise MachineError(f"node 0 is not there at {address}:{port}: {error.strerror or error}") from None
                time.sleep(1.0)
        try:
            return TCPStore(address, port, is_master=first, wait_for_workers=False)
        except RuntimeError as error:
            raise MachineError(f"{address}:{port}, beside --master_port: {error}") from error

    @property
    def go_on(self) -> bool:
        """Whether this node starts ranks in this round."""
        return self.plan.code is None and self.ranks_here > 0

    @property
    def ranks_here(self) -> int:
        return self.plan.ranks.get(self._name, 0)

    @property
    def first_of_all(self) -> tuple[int, int]:
        """The first rank of this node, and how many there are."""
        before = takewhile(lambda node: node != self._name, self.plan.ranks)
        return sum(self.plan.ranks[node] for node in before), sum(self.plan.ranks.values())

    def agree(self, code: int, ran_out: bool, stopping: bool) -> int:
        """Report how the ranks of this node ended, and take the plan of the next round; returns what to end with.

        Args:
            code: of the launch/run of this node alone.
            ran_out: a rank has stored a smaller micro-batch.
            stopping: the user has sent this node a signal.
        """
        if code == EXIT_DONE and self._round >= 0:
            self.plan = Plan(code=EXIT_DONE)
            return code
        self._round += 1
        final = stopping or (code in FINAL and not ran_out)
        report = {"code": code, "nproc": self._nproc, "final": final, "ran_out": ran_out}
        try:
            self._store.set(f"report/{self._round}/{self._name}", json.dumps(report))
            self.plan = self._decided(code) if self._name == self._all[0] else self._told()
        except RuntimeError as error:
            raise MachineError(f"{self._name}: node 0's launch/run is gone: {str(error).splitlines()[0]}") from error
        if self.plan.code is None and not self.ranks_here:
            say(f"{self._name} is not needed: the others go on without it")
            return EXIT_DONE
        return code if self.plan.code is None else self.plan.code

    def _decided(self, code: int) -> Plan:
        """Node 0: wait for the reports, and tell all what follows."""
        if self._round:
            self._store.set("round", str(self._round))
        reports = self._reports()
        missing = [node for node in self._all if node not in reports]
        plan = self._next(code, reports, missing)
        self._store.set(f"plan/{self._round}", json.dumps(asdict(plan)))
        told = reports if plan.code is None else self._all  # some may still be about to report
        if unread := [f"read/{self._round}/{node}" for node in told if node != self._name]:
            self._until(lambda: self._store.check(unread), LEAVE_SECONDS)  # the store ends with this process
        if self._round == 0 and missing:
            raise MachineError(f"{', '.join(missing)} did not come within {MEET_MINUTES:g} minutes")
        return plan

    def _next(self, code: int, reports: Mapping[str, Mapping[str, Any]], missing: Sequence[str]) -> Plan:
        """Node 0: what follows from the reports of this round, which some nodes may be missing from."""
        slots = {node: report["nproc"] for node, report in reports.items()}
        if finals := [report["code"] for report in reports.values() if report["final"]]:
            return Plan(code=finals[0])
        if self._round == 0:
            return Plan(code=EXIT_ENVIRONMENT) if missing else Plan(uuid.uuid4().hex, slots)
        if any(report["ran_out"] for report in reports.values()):
            say("all ranks start again with the smaller micro-batch")
        elif not self._restarts.another(code):
            return Plan(code=code)
        else:
            try:
                slots = used_of(slots, missing, self._minutes, self._out_dir) if missing else slots
            except MachineError as error:
                say(str(error))
                return Plan(code=error.exit_code)
            self._restarts.announce()
        return Plan(uuid.uuid4().hex, slots)

    def _reports(self) -> dict[str, dict[str, Any]]:
        """Those of all nodes, or of the ones that came in time; a final one or a signal ends the waiting."""
        found: dict[str, dict[str, Any]] = {}

        def all_known() -> bool:
            for node in self._all:
                if node not in found and self._store.check([key := f"report/{self._round}/{node}"]):
                    found[node] = json.loads(self._store.get(key))
            return len(found) == len(self._all) or any(report["final"] for report in found.values())

        # in later rounds the others may still be noticing that their peers are gone
        self._until(all_known, max(60 * self._minutes, LEAVE_SECONDS) if self._round else 60 * MEET_MINUTES)
        return {node: found[node] for node in self._all if node in found}

    def _told(self) -> Plan:
        """Every other node: wait for what node 0 decides."""
        key = f"plan/{self._round}"
        if not self._until(lambda: self._store.check([key]), math.inf):
            return Plan(code=EXIT_ENVIRONMENT)
        told = Plan(**json.loads(self._store.get(key)))
        self._store.set(f"read/{self._round}/{self._name}", "")
        return told

    def _until(self, done: Callable[[], bool], seconds: float) -> bool:
        """Look until it is done; returns False where the time is over first, or a signal has come."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline or signal.sigpending():
                return False
            time.sleep(_TICK)
        return True

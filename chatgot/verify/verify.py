"""Check whether a run folder is whole: every checkpoint against its manifest, and the journal against itself. Reads
only, and needs no torch.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path

import chatgot.run_folder as run_folder
from chatgot.checkpoint.load import MEANWHILE, TAG, Found, find_again, tags_in
from chatgot.errors import CheckpointError, quoted
from chatgot.observe.journal import Branch, read_journal, read_lines
from chatgot.proof import digest
from chatgot.proof.digest import Digest, Setup, Terms, read_digest


def verify(run: Path, tag: str | None = None) -> bool:
    """Check a run folder and print what was found, a line per checkpoint; returns whether it is whole.

    Args:
        tag: check the files of this checkpoint only.

    Raises:
        ConfigError: not a run folder.
        CheckpointError: there is no checkpoint `tag`.
    """
    run_folder.check(run)
    folder = run / run_folder.CHECKPOINTS
    tags = tags_in(folder)
    if tag is not None and tag not in tags:
        raise CheckpointError(f"{folder}: no checkpoint '{tag}' (there are: {', '.join(tags) or 'none'})")
    for note in run_folder.linked_folders(run):
        print(f"note: {note}")
    tags = tags if tag is None else [tag]
    whole, problems = _checkpoints(folder, tags)
    if folder.exists() and not folder.is_dir():
        problems.append(f"{folder}: is no folder")
    if tag is None:
        problems += _latest(folder, whole, tags)
    newest = max(whole, key=lambda checkpoint: checkpoint.manifest["sequence"], default=None)
    journal = JournalCheck(run)
    journal.read()
    problems += journal.problems
    if newest is not None and journal.lacks(newest.manifest["step"]):
        end = f"ends at step {max(journal.digests)}" if journal.digests else "has no digest"
        problems.append(f"{journal.path}: {end}, and does not cover {newest.tag}")
    print(f"journal: {journal.describe()}")
    for note in journal.notes:
        print(f"note: {note}")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print(f"{run}: {'whole' if not problems else f'{len(problems)} problem(s)'}")
    return not problems


def _checkpoints(folder: Path, tags: list[str]) -> tuple[list[Found], list[str]]:
    """Check the files of checkpoints; returns those that are whole, and the problems. One that the run deletes or
    saves again meanwhile is neither, and taken out of `tags`.
    """
    whole: list[Found] = []
    problems: list[str] = []
    for tag in list(tags):
        try:
            checkpoint = find_again(folder, tag)
        except CheckpointError as error:
            problems.append(str(error))
            print(f"checkpoint {tag}: NOT WHOLE")
            continue
        if checkpoint is None:
            print(f"checkpoint {tag}: deleted or saved again by the run meanwhile")
            tags.remove(tag)
            continue
        whole.append(checkpoint)
        for note in checkpoint.notes:
            print(f"note: {note}")
        files, step = checkpoint.manifest["files"], checkpoint.manifest["step"]
        size = sum(file["bytes"] for file in files.values())
        print(f"checkpoint {tag}: whole, {len(files)} file(s), {size / 1e6:.1f} MB, step {step}")
    return whole, problems


def _latest(folder: Path, whole: list[Found], tags: list[str]) -> list[str]:
    """Check stock DeepSpeed's `latest`; a kill right after a checkpoint's rename leaves it at the one before.

    Args:
        whole: the checkpoints that are; one that was published since counts too.
        tags: those that were checked.
    """
    if not whole:
        if not tags_in(folder):
            print("no checkpoint yet")
        return []
    path, named, problems = folder / run_folder.LATEST, "", list[str]()
    for _ in range(MEANWHILE):
        try:
            named = run_folder.read_bytes(path).decode("utf-8").strip()
        except (OSError, ValueError) as error:
            return [f"{path}: cannot be read: {error}"]
        if not TAG.fullmatch(named) or named in tags:
            break
        if named in tags_in(folder):  # published or saved again since they were listed
            more, problems = _checkpoints(folder, checked := [named])
            whole, tags = [*whole, *more], [*tags, *checked]
        else:
            time.sleep(0.01)  # it may just be making way for the same step, saved again
    newest = max(whole, key=lambda checkpoint: checkpoint.manifest["sequence"])
    if named == newest.tag:
        print(f"latest: {named}")
    elif any(named == checkpoint.tag for checkpoint in whole):
        why = "the run was killed in between, or is saving now"
        print(f"note: latest is {named}, and {newest.tag} is newer: {why}; a resume takes {newest.tag}")
    else:
        what = f"names {quoted(repr(named))}, which is no whole checkpoint"
        problems.append(f"{path}: {what}; the newest is {newest.tag}")
    return problems


@dataclass
class JournalCheck:
    """Reads metrics.jsonl and events.jsonl of a run folder and checks that they hang together."""

    run: Path
    path: Path = field(init=False)
    """Of metrics.jsonl."""
    digests: dict[int, Digest] = field(default_factory=dict)
    """Of the run as it stands, by step."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _gaps: list[tuple[int, int]] = field(default_factory=list)
    """First and last step of lines that the run itself says it could not write."""
    _twice: int = 0
    """Steps that were trained again and could be compared."""
    _exact: bool = True
    """Whether all of them were compared bit for bit."""
    _differs: bool = False
    _in_common: Terms = digest.BIT_FOR_BIT
    """What the run as it stands still has in common with the past that it left."""

    def __post_init__(self) -> None:
        self.path = self.run / run_folder.METRICS

    def describe(self) -> str:
        """Say on one line what the journal has."""
        if not self.digests:
            return "no digests"
        text = f"{len(self.digests)} steps with a digest, {min(self.digests)}..{max(self.digests)}"
        if self._twice:
            how = "bit for bit" if self._exact else "as far as changes allow"
            text += f"; {self._twice} of them were trained again, compared {how}"
        return text

    def read(self) -> None:
        """Read both files, and fill digests, problems and notes."""
        events, broken_events = read_journal(self.run / run_folder.EVENTS)
        starts = [event for event in events if event.get("event") in ("started", "resumed")]
        with_digests = [event for event in starts if "setup" in event]
        began = with_digests[0].get("step") if with_digests else 0
        first = began + 1 if isinstance(began, int) else 1
        if with_digests and starts[0] is not with_digests[0]:
            self.notes.append(f"steps up to {first - 1} were trained by an earlier ChatGoT, which wrote no digests")
        for event in events:
            if event.get("event") == "rolled_back":
                samples = f"{event.get('samples')} samples from {event.get('first_sample')} on were left out"
                steps = f"from step {event.get('from_step')} to {event.get('to_step')}"
                self.notes.append(quoted(f"rolled back {steps}; {samples}"))
        self._read_metrics(digest.setups(events), restarts=max(len(starts) - 1, 0))
        steps = [first - 1, *(step for step in sorted(self.digests) if step >= first)]
        missing = [(a + 1, b - 1) for a, b in itertools.pairwise(steps) if b > a + 1]
        if self._gaps:
            lost = _ranges(self._gaps)
            self.notes.append(f"{self.path}: the run could not write lines of step {lost} (a full disk?), and says so")
        if unexplained := [gap for gap in missing if not self._said_lost(*gap)]:
            self.problems.append(f"{self.path}: no digest of step {_ranges(unexplained)}")
        if broken_events:
            self.notes.append(f"{self.run / run_folder.EVENTS}: {broken_events} broken line(s)")

    def lacks(self, step: int) -> bool:
        """Whether the journal has no digest of a step, and no record of why."""
        return step not in self.digests and not self._said_lost(step, step)

    def _said_lost(self, first: int, last: int) -> bool:
        return any(begin <= first and last <= end for begin, end in self._gaps)

    def _read_metrics(self, setups: dict[str, Setup], restarts: int) -> None:
        branch: Branch[Digest] = Branch()
        tokens: Branch[int] = Branch()
        given_up: dict[int, Digest] = {}
        broken, torn_end, resumed_at = 0, False, 0
        for record in read_lines(self.path):
            torn_end = record is None
            if record is None or not isinstance(step := record.get("step"), int):
                broken += 1
                continue
            if isinstance(begin := record.get("lost_from_step"), int):
                self._gaps.append((begin, step))
            now = read_digest(record["digest"]) if "digest" in record else None
            if "digest" in record and now is None:
                self.problems.append(f"{self.path}: the digest of step {step} cannot be read")
            if (left := branch.go_to(step, once=now is not None)) is not None:
                given_up = given_up | left if self._in_common.exact else left
                self._in_common = digest.BIT_FOR_BIT
                resumed_at = step - 1
            tokens.go_to(step)
            if isinstance(record.get("data/tokens"), int):
                tokens.by_step[step] = record["data/tokens"]
            if now is not None:
                branch.by_step[step] = now
                if step in given_up:
                    self._compare(step, given_up.pop(step), now, setups, resumed_at)
        self.digests = branch.by_step
        for (before, fewer), (after, more) in itertools.pairwise(sorted(tokens.by_step.items())):
            if more <= fewer:
                what = f"{fewer} at step {before}, {more} at step {after}"
                self.problems.append(f"{self.path}: data/tokens does not grow: {what}")
                break
        if broken:
            ending = "the last line was cut off by a kill; " if torn_end else ""
            self.notes.append(f"{self.path}: {ending}{broken} broken line(s) in all, after {restarts} restart(s)")
        if broken > restarts + torn_end + len(self._gaps):
            why = "a kill leaves one at most: somebody else changed the file"
            self.problems.append(f"{self.path}: {broken} broken lines, and {why}")

    def _compare(self, step: int, before: Digest, now: Digest, setups: dict[str, Setup], resumed_at: int) -> None:
        """Compare a step with the same step of a past that was given up; only the first difference counts, and only one
        that proves something is a problem.
        """
        terms = digest.terms(setups.get(before.setup), setups.get(now.setup)).narrowed(self._in_common)
        if before.offset != now.offset:  # a rollback in between: other data by intention
            terms = Terms((), why="samples were left out")
        self._in_common = digest.after(before, now, terms)
        if not terms.exactly:
            return
        self._twice += 1
        self._exact &= terms.exact
        difference = digest.first_difference(before, now, terms, step - resumed_at)
        if difference is None or self._differs:
            return
        what = f"step {step} was trained again after a resume, and differs: {difference} (compared {terms.describe()})"
        if difference.proves:
            self._differs = True
            self.problems.append(f"{self.path}: {what}")
        else:
            self._in_common = Terms(terms.exactly, why=terms.why)
            self.notes.append(f"{what}; more than roundings usually do, and no proof of damage")


def _ranges(parts: list[tuple[int, int]]) -> str:
    """[(4, 4), (7, 9)] -> '4, 7..9'"""
    return quoted(", ".join(str(first) if first == last else f"{first}..{last}" for first, last in parts))

"""Is a run folder whole? Every checkpoint against its manifest, and the journal against itself. Reads only, and needs
no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from chatgot import run_folder
from chatgot.checkpoint.load import Found, find, tags_in
from chatgot.errors import CheckpointError
from chatgot.observe.journal import lines, read_journal
from chatgot.proof import digest
from chatgot.proof.digest import Digest, Setup


def verify(run: Path, tag: str | None = None, say: Callable[[str], None] = print) -> bool:
    """Check a run folder and print what was found, a line per checkpoint; whether it is whole.

    Args:
        tag: check the files of this checkpoint only.

    Raises:
        ConfigError: not a run folder.
        CheckpointError: there is no checkpoint `tag`.
    """
    run_folder.check(run)
    folder = run / run_folder.CHECKPOINTS
    problems: list[str] = []
    whole: list[Found] = []
    if tag is not None and tag not in tags_in(folder):
        raise CheckpointError(f"{folder}: no checkpoint '{tag}' (there are: {', '.join(tags_in(folder)) or 'none'})")
    for name in tags_in(folder) if tag is None else [tag]:
        try:
            found = find(folder, name)
            assert found is not None
        except CheckpointError as error:
            if (folder / name).exists():
                problems.append(str(error))
                say(f"checkpoint {name}: NOT WHOLE")
            else:
                say(f"checkpoint {name}: deleted by the run meanwhile")
            continue
        whole.append(found)
        files = found.manifest["files"]
        size = sum(file["bytes"] for file in files.values())
        say(f"checkpoint {name}: whole, {len(files)} file(s), {size / 1e6:.1f} MB, step {found.manifest['step']}")
    if tag is None:
        problems += _latest(folder, whole, say)
    journal = read(run)
    problems += journal.problems
    if whole:
        newest = max(whole, key=lambda found: found.manifest["sequence"])
        if newest.manifest["step"] not in journal.live:
            end = f"ends at step {max(journal.live)}" if journal.live else "has no digest"
            problems.append(f"{run / run_folder.METRICS}: {end}, and does not cover {newest.tag}")
    say(f"journal: {journal.describe()}")
    for note in journal.notes:
        say(f"note: {note}")
    for problem in problems:
        say(f"PROBLEM: {problem}")
    say(f"{run}: {'whole' if not problems else f'{len(problems)} problem(s)'}")
    return not problems


def _latest(folder: Path, whole: list[Found], say: Callable[[str], None]) -> list[str]:
    """`latest` is stock DeepSpeed's; a kill between a checkpoint's rename and it leaves it at the checkpoint before."""
    if not whole:
        if not tags_in(folder):
            say("no checkpoint yet")
        return []
    newest = max(whole, key=lambda found: found.manifest["sequence"]).tag
    path = folder / "latest"
    try:
        named = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        return [f"{path}: cannot be read: {error}"]
    if named == newest:
        say(f"latest: {named}")
    elif any(named == found.tag for found in whole):
        say(
            f"note: latest is {named}, and {newest} is newer: the run was killed in between, or is saving now; a "
            f"resume takes {newest}"
        )
    else:
        return [f"{path}: names {named!r}, which is no whole checkpoint; the newest is {newest}"]
    return []


@dataclass
class Journal:
    """What metrics.jsonl and events.jsonl say of the run."""

    first: int = 1
    """The first step that must have a digest."""
    live: dict[int, Digest] = field(default_factory=dict)
    """Digests of the run as it stands, by step."""
    twice: int = 0
    """Steps that were trained again and could be compared."""
    exact: bool = True
    """Whether all of them were compared bit for bit."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line."""
        if not self.live:
            return "no digests"
        text = f"{len(self.live)} steps with a digest, {min(self.live)}..{max(self.live)}"
        if self.twice:
            text += f"; {self.twice} of them were trained again, compared {'bit for bit' if self.exact else 'as far as changes allow'}"
        return text


def read(run: Path) -> Journal:
    """Read both files of a run folder and check that they hang together."""
    events, broken_events = read_journal(run / run_folder.EVENTS)
    setups = digest.setups(events)
    starts = [event for event in events if event.get("event") in ("started", "resumed")]
    with_digests = [event for event in starts if "setup" in event]
    found = Journal(first=int(with_digests[0].get("step", 0)) + 1 if with_digests else 1)
    if with_digests and starts[0] is not with_digests[0]:
        found.notes.append(f"steps up to {found.first - 1} were trained by an earlier ChatGoT, which wrote no digests")
    for event in events:
        if event.get("event") == "rolled_back":
            found.notes.append(
                f"rolled back from step {event.get('from_step')} to {event.get('to_step')}; {event.get('samples')} "
                f"samples from "
                f"{event.get('first_sample')} on were left out"
            )
    path = run / run_folder.METRICS
    tokens: dict[int, int] = {}
    given_up: dict[int, Digest] = {}
    last, broken, torn_end, base = 0, 0, False, 0
    for record in lines(path):
        torn_end = record is None
        if record is None or not isinstance(record.get("step"), int):
            broken += 1
            continue
        step = record["step"]
        now = Digest.from_json(record["digest"]) if "digest" in record else None
        if "digest" in record and now is None:
            found.problems.append(f"{path}: the digest of step {step} cannot be read")
        if step < last or (now is not None and step in found.live):  # a resume went back: what follows is trained again
            base = step - 1
            given_up |= {s: d for s, d in found.live.items() if s >= step}
            found.live = {s: d for s, d in found.live.items() if s < step}
            tokens = {s: t for s, t in tokens.items() if s < step}
        last = step
        if now is not None:
            found.live[step] = now
            if step in given_up:
                _compare(found, path, step, given_up.pop(step), now, setups, base)
        if "data/tokens" in record:
            tokens[step] = record["data/tokens"]
    found.problems += _gaps(found, path) + _tokens(tokens, path)
    restarts = max(len(starts) - 1, 0)
    if broken:
        ending = "the last line was cut off by a kill; " if torn_end else ""
        found.notes.append(f"{path}: {ending}{broken} broken line(s) in all, after {restarts} restart(s)")
    if broken > restarts + torn_end:
        found.problems.append(
            f"{path}: {broken} broken lines, and a kill leaves one at most: somebody else changed the file"
        )
    if broken_events:
        found.notes.append(f"{run / run_folder.EVENTS}: {broken_events} broken line(s)")
    return found


def _compare(
    found: Journal, path: Path, step: int, before: Digest, now: Digest, setups: dict[str, Setup], base: int
) -> None:
    by = digest.terms(setups.get(before.setup), setups.get(now.setup))
    if not by.exactly or before.offset != now.offset:  # a rollback in between: other data by intention
        return
    found.twice += 1
    found.exact &= by.exact
    difference = digest.first_difference(before, now, by, step - base)
    if difference is not None and not any("was trained again" in problem for problem in found.problems):
        found.problems.append(
            f"{path}: step {step} was trained again after a resume, and differs: {difference} (compared "
            f"{by.describe()})"
        )


def _gaps(found: Journal, path: Path) -> list[str]:
    missing = [step for step in range(found.first, max(found.live, default=0)) if step not in found.live]
    return [f"{path}: no digest of step {_ranges(missing)}"] if missing else []


def _tokens(tokens: dict[int, int], path: Path) -> list[str]:
    steps = sorted(tokens)
    for before, after in itertools.pairwise(steps):
        if tokens[after] <= tokens[before]:
            return [
                f"{path}: data/tokens does not grow: {tokens[before]} at step {before}, {tokens[after]} at step {after}"
            ]
    return []


def _ranges(steps: list[int]) -> str:
    """[4, 7, 8, 9] -> '4, 7..9'"""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], step]
        else:
            parts.append([step])
    return ", ".join("..".join(map(str, part)) for part in parts)

"""What the loop does about a divergence: stop and name the last good checkpoint, or go back to it and leave out the
data since.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatgot.checkpoint.load import Found, find
from chatgot.checkpoint.resume import resume
from chatgot.errors import CheckpointError, NumericsError

if TYPE_CHECKING:
    from chatgot.training.loop import Loop


def diverged(loop: Loop, why: str, must: bool = False) -> None:
    """Stop or roll back, as chatgot.guard.on_diverge says. Collective.

    A rollback goes to the newest whole checkpoint: weights, optimizer, random state and step number are its own, but
    the data goes on where it was. What is left out are all samples from the checkpoint's position to the last one that
    was fed before the divergence, in the order of the data; each later sample is used as before, some steps earlier
    than it would have been. The checkpoint is then saved again with the new position, so that a resume leaves out the
    same.

    Args:
        must: that save is the run's last chance, see `Loop.finish_saving`.

    Raises:
        NumericsError: on all ranks; it shall stop, has no rollback left, or there is no checkpoint to go back to.
    """
    guard = loop.guard.config
    if guard.on_diverge == "stop":
        raise stopped(loop, f"{why}; chatgot.guard.on_diverge = stop")
    if len(loop.guard.rollbacks) >= guard.max_rollbacks:
        raise stopped(
            loop,
            f"{why}, after {len(loop.guard.rollbacks)} rollback(s); chatgot.guard.max_rollbacks = "
            f"{guard.max_rollbacks}",
        )
    found = last_good(loop)
    if found is None:
        raise stopped(loop, why)
    loop.proof.flush()
    from_step, end, rollbacks = loop.step, loop.position.next_sample, loop.guard.rollbacks
    with loop.meter.paused("rollback"):
        client_state, _ = resume(loop.engine.engine, found, loop.fields, loop.ranks)
    loop.restore(client_state)
    first = loop.position.next_sample
    number = len(rollbacks) + 1
    loop.position.next_sample = end
    loop.position.skipped_samples += end - first
    loop.engine.skips_in_a_row = 0
    done = {
        "from_step": from_step,
        "to_step": loop.step,
        "first_sample": first,
        "samples": end - first,
        "number": number,
        "why": why,
    }
    loop.guard.rollbacks = [*rollbacks, done]
    loop.proof.end("the run was rolled back first")
    if loop.records.wandb is not None:
        loop.records.wandb.rolled_back(from_step)
    loop.records.event("rolled_back", checkpoint=found.tag, **done)
    loop.records.progress.say(
        f"WARNING: {why}. Rolled back to {found.tag} ({number} of {guard.max_rollbacks} times); samples "
        f"{first}..{end - 1} are left out, "
        f"training goes on at sample {end}"
    )
    loop.save_now(must)


def last_good(loop: Loop) -> Found | None:
    """The newest whole checkpoint of this run; None where there is none. A pending save is finished first.
    Collective.
    """
    found, error = None, None
    loop.finish_saving()
    if loop.ranks.rank == 0:
        try:
            found = find(loop.saver.folder)
        except CheckpointError as caught:
            error = caught
    loop.ranks.agree(error)
    return loop.ranks.from_rank_0(found)


def stopped(loop: Loop, why: str, hint: str = ". Try a lower lr or tighter clipping") -> NumericsError:
    """The error that ends the run, with the checkpoint that can be resumed. Collective."""
    found = last_good(loop)
    good = f"the last good checkpoint is {found.path}" if found is not None else "there is no checkpoint yet"
    return NumericsError(f"{why}{hint}; {good}")

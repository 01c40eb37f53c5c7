"""Refusals and their exit codes. Every message says what, where, the value seen, what is allowed and what to do."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_NUMERICS = 5
EXIT_ENVIRONMENT = 6
EXIT_INTERRUPTED = 75
"""Interrupted and saved, or the micro-batch was made smaller: run the same command again (EX_TEMPFAIL of sysexits)."""
EXIT_SECOND_INTERRUPT = 130


def quoted(value: object) -> str:
    """Show a value that came from a file, 200 characters of it at most."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


class ChatGoTError(Exception):
    """A refusal for the user: one message, no traceback unless --debug, and the process ends with `exit_code`."""

    exit_code = 1
    shared = False
    """Every rank raises it at the same place (ControlGroup.agree): they can end together."""


class ConfigError(ChatGoTError):
    """Usage or configuration is wrong (exit 2)."""

    exit_code = EXIT_CONFIG


class DataError(ChatGoTError):
    """The text, or what was prepared from it, cannot be used (exit 3)."""

    exit_code = EXIT_DATA


class CheckpointError(ChatGoTError):
    """A checkpoint cannot be written, or a requested one cannot be loaded (exit 4)."""

    exit_code = EXIT_CHECKPOINT


class FolderMovedError(CheckpointError):
    """The run folder does not lie where it lay (exit 4): to try again would make another one."""


class NumericsError(ChatGoTError):
    """Training diverged: non-finite loss or gradients that do not recover (exit 5)."""

    exit_code = EXIT_NUMERICS


class MachineError(ChatGoTError):
    """The machine or the process group cannot do what was asked (exit 6)."""

    exit_code = EXIT_ENVIRONMENT


class RunAgainError(ChatGoTError):
    """The run cannot go on in these processes, but the next start of the same command can (exit 75)."""

    exit_code = EXIT_INTERRUPTED

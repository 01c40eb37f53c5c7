"""Writing a save: DeepSpeed's files, at once or copied to memory first, flushed and hashed; then the renames that give
their folder its name, which a kill between any two of them cannot spoil.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from chatgot.checkpoint import faults, manifest
from chatgot.checkpoint.manifest import Measured
from chatgot.engine import guards
from chatgot.errors import CheckpointError
from chatgot.files import put_back, replace_folder, sync, write_atomically
from chatgot.run_folder import LATEST, REPLACED, UNFINISHED

VISIBLE_WITHIN_S = 60.0
"""How long rank 0 waits until a file of another machine shows up in its own listing (NFS keeps listings a while)."""


@contextlib.contextmanager
def file_operations(engine: Any, snapshots: Snapshots | None) -> Iterator[list[OSError | RuntimeError]]:
    """Let this rank's file operations note their failure instead of raising it (see guards.file_operations), and take
    `snapshots`, if given, of what is to be written. torch.save reports a full disk as a RuntimeError.
    """
    failures: list[OSError | RuntimeError] = []

    def noted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            try:
                paths = [Path(value).name for value in (*args, *kwargs.values()) if isinstance(value, (str, Path))]
                faults.operation(" ".join([operation.__name__.strip("_"), *paths]))
                return operation(*args, **kwargs)
            except shutil.Error as error:  # of copytree: a list of all files that could not be copied
                failures.append(OSError("{1}: {2}".format(*error.args[0][0])))
            except (OSError, RuntimeError) as error:
                failures.append(error)

        return attempt

    def copied(state_dict: Any, path: str) -> None:
        assert snapshots is not None
        try:
            snapshots.taken.append((Path(path), snapshots.take(state_dict)))
        except (RuntimeError, ValueError) as error:  # no memory for the copy
            failures.append(RuntimeError(f"no copy for saving in the background (chatgot.checkpoint.async): {error}"))

    with guards.file_operations(
        engine, lambda name, theirs: copied if name == "save" and snapshots is not None else noted(theirs)
    ):
        yield failures


class Snapshots:
    """Copies state dicts into the CPU's memory, the next one into the memory of the one before: memory that has been
    written to once is several times faster.

    On CUDA that memory is pinned. It is as large as what this rank saves, and is kept until the end of the run.
    """

    def __init__(self) -> None:
        self.taken: list[tuple[Path, Any]] = []
        """The copies, and the file that each is to be written to."""
        self._buffers: list[torch.Tensor] = []
        self._used = 0

    def reuse(self) -> None:
        """Forget the copies taken so far."""
        self.taken.clear()
        del self._buffers[self._used :]  # the layout of what is saved has changed
        self._used = 0

    def take(self, state: Any) -> Any:
        """Copy a state dict, after the work that was queued on its device; ValueError: a tensor in it is not dense.

        Tensors that share memory share it in the copy too, so that torch.save writes it once, as it would have.
        """
        file = io.BytesIO()
        copier = _Copier(file, self._buffer)
        copier.dump(state)
        if copier.queued:
            torch.cuda.synchronize()
        return _Unpickler(file.getvalue(), copier.tensors).load()

    def _buffer(self, size: int, pinned: bool) -> torch.Tensor:
        index, self._used = self._used, self._used + 1
        if index < len(self._buffers):
            buffer = self._buffers[index]
            if buffer.numel() == size:
                return buffer
        fresh = torch.empty(size, dtype=torch.uint8)
        if pinned and size:
            _pin(fresh)
        self._buffers[index : index + 1] = [fresh]
        return fresh


def _pin(buffer: torch.Tensor) -> None:
    """Lock the buffer's pages, so that a GPU copies into them by itself; where that fails, copies are slower.

    torch's own pinned memory takes the next power of two: 16 GiB for 9.
    """
    runtime: Any = torch.cuda.cudart()
    if runtime.cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0) == runtime.cudaError.success:
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())


class _Copier(pickle.Pickler):
    """Pickles a state dict with numbers in the places of its tensors, and copies each of them to the CPU, once."""

    def __init__(self, file: io.BytesIO, buffer: Callable[[int, bool], torch.Tensor]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self.queued = False
        """Whether copies are still under way from a CUDA device."""
        self._buffer = buffer
        self._numbers: dict[int, int] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.tensors)
            self.tensors.append(self._copy(obj))
        return self._numbers[id(obj)]

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor with all that torch.save writes of it; DeepSpeed marks some with a number (ds_id)."""
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = f"a {tensor.layout} tensor of {tensor.dtype}"
            raise ValueError(f"{kind} cannot be copied for saving in the background")
        original = tensor.detach().untyped_storage()
        key = original._cdata  # what torch.save knows a storage by
        if key not in self._storages:
            on_cuda = original.device.type == "cuda"
            buffer = self._buffer(original.nbytes(), on_cuda)
            buffer.copy_(torch.empty(0, dtype=torch.uint8, device=original.device).set_(original), non_blocking=True)
            self._storages[key] = buffer.untyped_storage()
            self.queued = self.queued or on_cuda
        copy = torch.empty(0, dtype=tensor.dtype)
        copy.set_(self._storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())
        if isinstance(tensor, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, requires_grad=False)
        vars(copy).update(vars(tensor))
        return copy.requires_grad_(tensor.requires_grad)


class _Unpickler(pickle.Unpickler):
    def __init__(self, graph: bytes, tensors: list[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(graph))
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> torch.Tensor:
        return self._tensors[pid]


def tag_of(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def writer(name: str) -> int:
    """Tell which rank wrote a file, by DeepSpeed's naming (engine.py, _get_zero_ckpt_name and the NVMe copies)."""
    match = re.search(r"(?:^|/)(?:\w*_)?zero_pp_rank_(\d+)_", name) or re.match(r"offloaded_tensors/rank(\d+)/", name)
    return int(match[1]) if match else 0  # all others are rank 0's


def flush_and_measure(folder: Path, rank: int, world_size: int) -> dict[str, Measured]:
    """Flush and hash the files that a rank wrote; by name."""
    own = {}
    for name in manifest.listed(folder):
        if writer(name) % world_size == rank:
            faults.operation(f"flush and hash {name}")
            with ThreadPoolExecutor(1) as thread:  # hashed out of the page cache while the disk still writes it
                flushed = thread.submit(sync, folder / name)
                own[name] = manifest.measure(folder / name)
                flushed.result()
    return own


def check_shared(folder: Path, gathered: list[dict[str, Measured]]) -> None:
    """Wait until rank 0 sees exactly the files that the ranks have hashed, VISIBLE_WITHIN_S at most.

    Raises:
        CheckpointError: it does not: the ranks do not share the file system, or somebody else writes there.
    """
    until = time.monotonic() + VISIBLE_WITHIN_S
    hashed = {name for part in gathered for name in part}
    while hashed - (seen := set(manifest.listed(folder))) and time.monotonic() < until:
        time.sleep(0.5)
    for rank, part in enumerate(gathered):
        if unseen := sorted(part.keys() - seen):
            raise CheckpointError(
                f"{folder}: rank {rank} wrote {unseen[0]}, and rank 0 does not see it: the ranks do not share this "
                "file system; give an --out_dir on a file system that all machines share"
            )
    if unhashed := sorted(seen - hashed):
        raise CheckpointError(f"{folder}: nobody has written {unhashed[0]}: another program writes into this folder")


def sweep(folder: Path) -> list[str]:
    """Clear up after a save that was cut short, while nobody else saves here; returns a warning for what stays."""
    take_back(folder)
    notes = []
    for pattern in (f"{UNFINISHED}*", f"{REPLACED}*", f".{LATEST}.tmp-*"):
        for leftover in folder.glob(pattern):
            try:
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
            except OSError as error:
                notes.append(f"{leftover}: cannot be deleted: {error}; it does no harm there")
    return notes


def take_back(folder: Path) -> None:
    """Give a checkpoint that made way for another one of its step the name back, if the other one never got it."""
    for replaced in folder.glob(f"{REPLACED}*"):
        put_back(replaced, replaced.with_name(replaced.name.removeprefix(REPLACED)))


def next_sequence(folder: Path) -> int:
    """Choose the next one's place in the order of publication."""
    newest = 0
    for path in folder.glob(f"*/{manifest.NAME}"):
        with contextlib.suppress(CheckpointError):  # a damaged one is reported where checkpoints are chosen
            newest = max(newest, manifest.read(path.parent)["sequence"])
    return newest + 1


def publish(unfinished: Path, tag: str, fields: Mapping[str, Any], gathered: list[dict[str, Measured]]) -> list[str]:
    """List all files in the manifest of the unfinished checkpoint, give it its name, and point `latest` to it.
    Returns what the user must hear.

    Args:
        fields: the manifest's, without sequence and files.
        gathered: the files of every rank.

    Raises:
        OSError: it is published, if only the flush after the rename or `latest` failed.
    """
    folder = unfinished.parent
    files = dict(sorted((name, measured) for part in gathered for name, measured in part.items()))
    for parent in sorted({(unfinished / name).parent for name in files} - {unfinished}):
        sync(parent)
    sequence = next_sequence(folder)
    manifest.write(unfinished, {**fields, "sequence": sequence, "files": files}, faults.operation)
    replace_folder(unfinished, folder / tag, folder / f"{REPLACED}{tag}", faults.operation)
    if (folder / LATEST).is_dir():
        return [f"{folder / LATEST}: is a folder, so that it cannot name {tag} for stock DeepSpeed; rename it"]
    write_atomically(folder / LATEST, tag, faults.operation)
    return []

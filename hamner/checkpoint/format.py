"""The module keeps saved state on disk: a checkpoint folder is whole or does not exist.

    checkpoints/step_00001000/
        model.safetensors       the module's parameters, in their compute dtype, and buffers
        optimizer.safetensors   fp32 masters and moments
        state.json              counters, data position, RNG state, versions
        config.json             of the run, as is tokenizer.json: with them, a checkpoint can be
        tokenizer.json          used wherever it is copied to; earlier versions' have neither
        manifest.json           size and SHA-256 of each of the others

Written to a temporary folder beside it, flushed to disk, then renamed. Nothing is ever unpickled.
"""

import base64
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hamner.config.train import CONFIG_FILE, TOKENIZER_FILE
from hamner.errors import UserError
from hamner.files import flush, read_json, usual_permissions
from hamner.parallel.tensors import fill

Tensors = Mapping[str, Tensor]

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
_FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
_RUN_FILES = (CONFIG_FILE, TOKENIZER_FILE)
_FORMAT = 1
_RESUME_WITH_THE_SAME = "resume with the model the run was started with"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_TEMPORARY_PREFIX = ".saving_"
_REPLACED_PREFIX = ".replaced_"
"""of a checkpoint while another of the same step gets its name"""


class CheckpointError(UserError):
    """The exception says that a checkpoint is damaged, incomplete or not one of ours."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint is a whole folder."""

    path: Path
    step: int

    @classmethod
    def at(cls, path: Path) -> "Checkpoint":
        """The method gives the checkpoint at a path, under whatever name it was copied there."""
        return cls(path, read_json(path / STATE_FILE, CheckpointError).get("step", 0))

    def state(self) -> dict:
        """The method reads `state.json`."""
        return read_json(self.path / STATE_FILE, CheckpointError)

    def verify(self, except_for: Collection[str] = ()) -> None:
        """The method checks files against the manifest, `except_for` some.

        Raises:
            CheckpointError: names the first file that is missing, cut short or altered.
        """
        manifest = read_json(self.path / MANIFEST_FILE, CheckpointError)
        files = manifest.get("files")
        if (
            manifest.get("format") != _FORMAT
            or not isinstance(files, dict)
            or not {*_FILES} <= set(files) <= {*_FILES, *_RUN_FILES}
        ):
            raise CheckpointError(
                f"{self.path / MANIFEST_FILE} is not the manifest of a Hamner checkpoint: it must "
                f"have format {_FORMAT} and name {', '.join(_FILES)}"
            )
        for name in (name for name in files if name not in except_for):
            path, expected = self.path / name, files[name]
            if not path.is_file():
                raise CheckpointError(f"{path} is missing")
            try:
                found = _describe(path)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
            if not isinstance(expected, dict) or found["bytes"] != expected.get("bytes"):
                raise CheckpointError(
                    f"{path} has {found['bytes']:,} bytes, not those of its manifest: it was cut "
                    "short or replaced"
                )
            if found["sha256"] != expected.get("sha256"):
                raise CheckpointError(
                    f"{path} does not match the SHA-256 of its manifest: it is damaged"
                )

    def load_model(self, parameters: Tensors) -> None:
        """The method copies the saved weights into `parameters`.

        Raises:
            CheckpointError: names or shapes that are not the model's.
        """
        _load(self.path / MODEL_FILE, parameters)

    def load_optimizer(self, masters: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors) -> None:
        """The method copies masters and moments.

        `masters` maps every parameter to its fp32 weights. A run that was saved in fp32 has no
        separate masters: there `load_model(masters)` has already filled them.
        """
        path = self.path / OPTIMIZER_FILE
        _load(path, exp_avg, "exp_avg.")
        _load(path, exp_avg_sq, "exp_avg_sq.")
        _load(path, masters, "master.", some_are_saved=True)


def _load(path: Path, tensors: Tensors, kind: str = "", *, some_are_saved: bool = False) -> None:
    """The function copies what `path` has as `kind` + name, tensor by tensor: no second copy.

    Where a process holds shards of them, it takes its part.
    """
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    with file:
        names = set(file.keys())
        saved = {name.removeprefix(kind) for name in names if name.startswith(kind)}
        different = sorted(saved ^ set(tensors))
        if different and not some_are_saved:
            raise CheckpointError(
                f"{path} holds another model: {len(different)} tensors differ, among them "
                f"{different[0]}; {_RESUME_WITH_THE_SAME}"
            )
        for name, tensor in tensors.items():
            if name not in saved:
                continue
            try:
                whole = file.get_tensor(kind + name)
            except SafetensorError as error:
                raise CheckpointError(f"{path}: {kind}{name} cannot be read: {error}") from error
            if whole.shape != tensor.shape:
                raise CheckpointError(
                    f"{path}: {kind}{name} has shape {tuple(whole.shape)}, this model needs "
                    f"{tuple(tensor.shape)}; {_RESUME_WITH_THE_SAME}"
                )
            fill(tensor, whole)


class Writer:
    """A writer is a process that has all tensors; `ShardedSaver` is one of several that share."""

    is_main = True

    def on_main(self, function: Callable) -> Any:
        """The method gives every process what `function` returns in rank 0, or its OSError."""
        return function()

    def write(self, path: Path, tensors: Tensors) -> None:
        """The method writes a file of tensors, each process its part.

        Raises:
            OSError: also where safetensors has an error of its own, as for a full disk.
        """
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            with usual_permissions(path):
                save_file(on_cpu, path)
        except SafetensorError as error:
            match = re.search(r"os error (\d+)", str(error))
            if match is None:
                raise OSError(errno.EIO, str(error)) from error
            number = int(match[1])
            raise OSError(number, os.strerror(number)) from error


def save(
    folder: Path,
    step: int,
    *,
    model: Tensors,
    optimizer: Tensors,
    state: Mapping,
    run_files: Sequence[Path] = (),
    writer: Writer | None = None,
) -> Checkpoint:
    """The function writes `folder`/step_NNNNNNNN, whole or not at all.

    The folder must exist: made anew here, it would hide a mount that has vanished.

    Args:
        model: the module's parameters and buffers.
        optimizer: moments and whole fp32 masters, each under `KIND.NAME`, so that a run of any
            precision and kernels can resume from them.
        state: of state.json.
        run_files: config.json and tokenizer.json of the run, as far as they are there.
        writer: this process's; default one that has all tensors.

    Raises:
        OSError: the disk is full, gone or cannot be written; nothing new named step_* is left.
    """
    temporary = folder / f"{_TEMPORARY_PREFIX}{step:08d}"
    writer = writer or Writer()

    def finish() -> Checkpoint:
        for path in run_files:
            if path.is_file():
                shutil.copyfile(path, temporary / path.name)
        return finish_save(temporary, step, state)

    writer.on_main(lambda: _make_anew(temporary))
    try:
        writer.write(temporary / MODEL_FILE, model)
        writer.write(temporary / OPTIMIZER_FILE, optimizer)
        return writer.on_main(finish)
    except BaseException:
        if writer.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _make_anew(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def finish_save(temporary: Path, step: int, state: Mapping) -> Checkpoint:
    """The function makes a checkpoint of a temporary folder that has its other files."""
    final = temporary.with_name(f"step_{step:08d}")
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    names = (*_FILES, *(name for name in _RUN_FILES if (temporary / name).exists()))
    files = {name: _describe(temporary / name) for name in names}
    manifest = json.dumps({"format": _FORMAT, "files": files}, indent=1)
    (temporary / MANIFEST_FILE).write_text(manifest, encoding="utf-8")
    for name in (*files, MANIFEST_FILE):
        flush(temporary / name)
    flush(temporary)
    replaced = final.with_name(f"{_REPLACED_PREFIX}{final.name}")
    if final.exists():
        # Saved already at this step (an interrupt right after a save). It is kept until the new one
        # has the name; killed in between, `take_back` gives it back.
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        take_back(final.parent)
        raise
    flush(temporary.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return Checkpoint(final, step)


def take_back(folder: Path) -> None:
    """The function gives checkpoints their names again that no other one has got in their place.

    Raises:
        OSError: the folder cannot be written.
    """
    for replaced in folder.glob(f"{_REPLACED_PREFIX}*"):
        final = replaced.with_name(replaced.name.removeprefix(_REPLACED_PREFIX))
        if not final.exists():
            replaced.rename(final)


def find(folder: Path) -> list[Checkpoint]:
    """The function lists the checkpoints in `folder`, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found.append(Checkpoint(path, int(match[1])))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The function finds the newest checkpoint that is whole, and what is wrong with newer ones."""
    errors = []
    for candidate in reversed(find(folder)):
        try:
            candidate.verify()
        except CheckpointError as error:
            errors.append(error)
        else:
            return candidate, errors
    return None, errors


def set_aside(folder: Path, newer_than: int) -> None:
    """The function renames checkpoints newer than a step to damaged_step_*: they count as none."""
    for damaged in find(folder):
        if damaged.step > newer_than:
            aside = damaged.path.with_name(f"damaged_{damaged.path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.path.rename(aside)


def best(folder: Path) -> Checkpoint | None:
    """The function finds the lowest validation loss, in runs that look for it (`--patience`).

    Every checkpoint's state says which one that is; the newest knows best. Where the step that it
    names is not there, as its save failed, the next older one says which was the best until then.
    """
    found = find(folder)
    by_step = {checkpoint.step: checkpoint for checkpoint in found}
    for checkpoint in reversed(found):
        step = checkpoint.state().get("best_step")
        if step is None or step in by_step:
            return by_step.get(step)
    return None


def retain(folder: Path, keep: int, keep_every: int = 0) -> None:
    """The function removes what an unfinished save left, and checkpoints that are too many.

    Args:
        folder: of the checkpoints. The best one stays, however old.
        keep: newest ones that stay; 0 keeps all.
        keep_every: the first checkpoint at or after each multiple of so many steps stays too; 0
            is none.
    """
    take_back(folder)
    for prefix in (_TEMPORARY_PREFIX, _REPLACED_PREFIX):
        for leftover in folder.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    if keep:
        kept, spans = best(folder), 0
        for old in find(folder)[:-keep]:
            if keep_every and old.step // keep_every > spans:
                spans = old.step // keep_every
            elif old != kept:
                _remove(old.path)


def rng_state() -> dict[str, str]:
    """The function gives the state of torch's global generators as text."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy()).decode() for name, state in states.items()}


def set_rng_state(states: Mapping[str, str]) -> None:
    """The function restores what `rng_state` returned, as far as this machine has the devices.

    Raises:
        CheckpointError: it is not what `rng_state` returned.
    """
    try:
        for device, text in states.items():
            state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
            if device == "cpu":
                torch.set_rng_state(state)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(state)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the saved RNG state is damaged ({type(error).__name__})") from error


def _remove(checkpoint: Path) -> None:
    """The function renames before it deletes, so that a folder named step_* is whole to the end."""
    doomed = checkpoint.with_name(f"{_TEMPORARY_PREFIX}removing_{checkpoint.name}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _describe(path: Path) -> dict:
    """The function gives what the manifest says of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}

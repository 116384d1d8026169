"""AOTInductor packages as their users make them: ``torch._inductor.aoti_compile_and_package`` of any model.

Receives a .pt2; owns the machine code in it, which is loaded into the process, and a container of it per lane. Nothing
else in the archive is read but what says for which machine it is.

Compiled code trusts its inputs. Whether it is given what it was compiled for is found once, at the start: the same code
is loaded a second time with torch's own checks of kinds and sizes switched on (AOTI_RUNTIME_CHECK_INPUTS), which a
library looks for when it first runs. They are left out when it serves, since they refuse fewer than two ids, too.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_char_p, c_int32, c_size_t
from pathlib import Path
from typing import Any

import torch

from narsil.artifacts.pt2 import check_layout, check_package, keys_of, library_in
from narsil.backends.aoti import Container, Library
from narsil.errors import ArtifactError, first_line

__all__ = ["Packaged", "checking", "load_packaged"]

_CHECKS = "AOTI_RUNTIME_CHECK_INPUTS"
_TOLD = (_CHECKS.encode(), b"unmatched dtype")  # texts in the code of the checks
_AGAIN = "compile it again here, or serve the torch.export program that it was compiled from"
_MAPS_ITSELF = 1 << 30  # bytes of a library, from which on it may read its weights out of its own file later
_BYTES = {0: 1, 1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 8, 11: 1, 15: 2}  # of a number, by torch's ScalarType


class Packaged:
    """A package's code and one container of it, to be run by one thread at a time."""

    def __init__(self, library: Library, folder: Any = None) -> None:
        """``folder``: what is kept as long as the library may read from it."""
        self._library = library
        self._folder = folder
        self._container = Container(library)
        taken, given = self._specification()
        (self._outputs,) = self._container.asked("GetNumOutputs", c_size_t)
        (count,) = self._container.asked("GetNumInputs", c_size_t)
        keys = keys_of(taken)
        # Of each input: the key of the dict that it comes in; empty where it comes in none.
        self.keys = keys if len(keys) == count else ("",) * count
        self._given = given

    def __call__(self, given: Sequence[torch.Tensor]) -> Any:
        """The result for tensors in the program's order, as the model's author returned it. Drops the GIL."""
        from torch.utils import _pytree as pytree

        return pytree.tree_unflatten(self._container.run_tensors(given, self._outputs), self._given)

    def share(self) -> Packaged:
        """Another container over the same code and weights."""
        return Packaged(self._library, self._folder)

    def close(self) -> None:
        """Frees the container."""
        self._container.close()

    def constants(self) -> dict[str, int]:
        """The tensors that the code holds, by the model's names for them -> how many numbers each has."""
        found = {}
        for at in range(*self._container.asked("GetNumConstants", c_size_t)):
            (name,) = self._container.asked("GetConstantOriginalFQN", c_char_p, of=at)
            (size,) = self._container.asked("GetConstantDataSize", c_size_t, of=at)
            (kind,) = self._container.asked("GetConstantDtype", c_int32, of=at)
            found[(name or b"").decode("utf-8", "replace") or str(at)] = size // _BYTES.get(kind, 1)
        return found

    def weight_bytes(self) -> int:
        """How many bytes the tensors have that the code needs."""
        count = range(*self._container.asked("GetNumConstants", c_size_t))
        return sum(self._container.asked("GetConstantDataSize", c_size_t, of=at)[0] for at in count)

    def _specification(self) -> tuple[Any, Any]:
        """(of the inputs, as JSON; of the outputs, as a pytree). Raises ArtifactError."""
        from torch.utils import _pytree as pytree

        try:
            taken, given = self._container.asked("GetCallSpec", c_char_p, c_char_p)
            return json.loads(taken)[1], pytree.treespec_loads(given.decode())
        except (ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
            raise ArtifactError(
                f"the package takes or returns what is no plain structure of tensors ({first_line(error)}); return the "
                "scores as a dict, a tuple or a tensor"
            ) from None


def load_packaged(path: Path) -> Packaged:
    """The code of a package, loaded. Raises ArtifactError where it is for another machine, or no such package."""
    return _loaded(path)


@contextmanager
def checking(path: Path) -> Iterator[Packaged]:
    """The same, checking the kinds and the sizes of what it is given, to be run within the context alone."""
    before = os.environ.get(_CHECKS)
    os.environ[_CHECKS] = "1"
    packaged = None
    try:
        packaged = _loaded(path)
        yield packaged
    finally:
        if packaged is not None:
            packaged.close()
        if before is None:
            del os.environ[_CHECKS]
        else:
            os.environ[_CHECKS] = before


def _loaded(path: Path) -> Packaged:
    names = check_layout(path)
    name = library_in(path, names)
    check_package(path, names)
    folder = tempfile.TemporaryDirectory(prefix="narsil-")
    library = Path(folder.name) / "model.so"
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as source, library.open("wb") as target:
            shutil.copyfileobj(source, target)
        _require_checks(path, library)
        loaded = Library(library, path, _AGAIN)
        size = library.stat().st_size
    except (OSError, zipfile.BadZipFile) as error:
        folder.cleanup()
        raise ArtifactError(f"{path}: its code cannot be unpacked ({first_line(error)}); copy it again") from None
    except ArtifactError:
        folder.cleanup()
        raise
    if size < _MAPS_ITSELF:
        # It is mapped: nothing of it stays behind, however the process ends.
        folder.cleanup()
    packaged = Packaged(loaded, folder)
    if size < _MAPS_ITSELF and loaded.embedded() < packaged.weight_bytes():
        packaged.close()
        raise ArtifactError(
            f"{path} does not hold its weights in its code, as package_constants_in_so has it; compile it again with "
            "that on, or serve the torch.export program that it was compiled from"
        )
    return packaged


def _require_checks(path: Path, library: Path) -> None:
    """Raises ArtifactError where code cannot check what it is given."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        if any(code.find(text) < 0 for text in _TOLD):
            raise ArtifactError(
                f"{path} was compiled without the checks of its inputs that torch writes by itself today, so that a "
                f"schema file could not be held against it; {_AGAIN}"
            )

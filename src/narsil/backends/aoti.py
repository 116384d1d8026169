"""Runs what AOTInductor compiled through its C interface, without the GIL.

Receives a .pt2 package of a core (see compile/core.py); owns the shared library that it holds, and per lane one
container: the library's own copy of the weights and its state. torch's own runner holds the GIL for the whole forward;
a foreign function call through ctypes drops it. Source of the interface: torch/csrc/inductor/aoti_runtime/interface.h
and aoti_torch/c/shim.h.

Ownership: handles of inputs are stolen by the run, handles of outputs are the caller's to delete. Inputs are lent:
the tensors made over them own no memory and end with the run.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
import zipfile
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch

from narsil.dataflow import Floats
from narsil.errors import ArtifactError, ForwardFailed, first_line, last_line

__all__ = ["Container", "CoreLibrary", "Library"]

_MAX_LIBRARY_BYTES = 4 << 30


class Library:
    """The code of a package, loaded into the process once; all containers run it."""

    def __init__(self, path: Path, package: Path, again: str) -> None:
        """``path``: the library, of which the ``package`` is where users know it from; ``again``: what to do where it
        cannot be loaded, which is an ArtifactError."""
        try:
            self._code = ctypes.CDLL(str(path))
        except OSError as error:
            told = first_line(error).replace(str(path), path.name)
            raise ArtifactError(f"{package}: its code cannot be loaded ({told}); {again}") from None
        try:
            self.create: Any = self._code.AOTInductorModelContainerCreateWithDevice
            self.delete: Any = self._code.AOTInductorModelContainerDelete
            self.run: Any = self._code.AOTInductorModelContainerRun
        except AttributeError as error:
            raise ArtifactError(f"{package} is no AOTInductor package of this torch ({error}); {again}") from None
        self.create.argtypes = (POINTER(c_void_p), c_size_t, c_char_p, c_char_p)
        self.delete.argtypes = (c_void_p,)
        self.run.argtypes = (c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p)
        self._last_error: Any = getattr(self._code, "AOTInductorGetLastError", None)
        if self._last_error is not None:
            self._last_error.argtypes = (POINTER(c_char_p),)

    def error(self) -> str:
        """What the last failed call on this thread said."""
        text = c_char_p()
        if self._last_error is None or self._last_error(byref(text)) or not text.value:
            return "see standard error"
        return last_line(RuntimeError(text.value.decode("utf-8", "replace")))

    def embedded(self) -> int:
        """The bytes of weights that lie in the library itself; 0 where it does not say."""
        try:
            start, end = (
                ctypes.addressof(ctypes.c_char.in_dll(self._code, f"_binary_constants_bin_{edge}"))
                for edge in ("start", "end")
            )
        except ValueError:
            return 0
        return end - start

    def asked(self, container: c_void_p, function: str, kinds: Sequence[Any], *arguments: Any) -> list[Any]:
        """What a function of the interface tells of a container: a value of each of these ctypes' kinds. Raises
        ArtifactError."""
        found = [kind() for kind in kinds]
        call = getattr(self._code, "AOTInductorModelContainer" + function, None)
        if call is None or call(container, *arguments, *map(byref, found)):
            raise ArtifactError(f"the package's code does not tell its {function}; compile it again")
        return [each.value for each in found]


class CoreLibrary(Library):
    """The code of what Narsil compiled."""

    def __init__(self, package: Path, signature: str) -> None:
        """Raises ArtifactError where the package is damaged or was compiled for something other than ``signature``."""
        code = _library_of(package, signature)
        # The file can go once it is mapped: nothing of the package stays behind, however the process ends.
        with tempfile.TemporaryDirectory(prefix="narsil-") as folder:
            path = Path(folder) / "model.so"
            path.write_bytes(code)
            super().__init__(path, package, "compile the model again")


class Container:
    """One lane's instance. ``run`` by one thread at a time."""

    def __init__(self, library: Library, inputs: int = 2) -> None:
        self._library = library
        self._handle = c_void_p()
        if library.create(byref(self._handle), 1, b"cpu", None):
            raise ArtifactError(f"the compiled model cannot be set up ({library.error()}); compile it again")
        self._inputs = (c_void_p * inputs)()
        self._outputs = (c_void_p * 1)()

    def run(self, dense: Floats, pooled: torch.Tensor) -> Floats:
        """(B, D) float32, (B, T * dim) float32, both contiguous -> (B,) float32, memory of the caller's own."""
        return self.run_all([torch.from_numpy(dense if dense.flags.writeable else dense.copy()), pooled], 1)[:, 0]

    def run_all(self, inputs: Sequence[torch.Tensor], columns: int) -> Floats:
        """(B, its width) float32, each contiguous -> (B, ``columns``) float32, memory of the caller's own."""
        rows = len(inputs[0])
        for place, given in enumerate(inputs):
            self._inputs[place] = _lent(given.data_ptr(), rows, given.shape[1])
        self._outputs[0] = None
        # The one long call: it runs without the GIL.
        if self._library.run(self._handle, self._inputs, len(inputs), self._outputs, 1, None, None):
            raise ForwardFailed(f"the compiled model failed: {self._library.error()}")
        return _taken(self._outputs[0], rows, columns)

    def run_tensors(self, inputs: Sequence[torch.Tensor], outputs: int) -> list[torch.Tensor]:
        """Tensors of any kinds and shapes, as many as the code takes and gives. Raises ForwardFailed."""
        given = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(inputs))
        handles = (c_void_p * len(inputs))(*(_pointer_in(capsule, None) for capsule in given))
        made = (c_void_p * outputs)()
        if self._library.run(self._handle, handles, len(inputs), made, outputs, None, None):
            raise ForwardFailed(f"the compiled model failed: {self._library.error()}")
        return [torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_capsule(each, None, None)) for each in made]

    def asked(self, function: str, *kinds: Any, of: int | None = None) -> list[Any]:
        """See Library.asked; ``of``: the number of what is asked about, where there are several."""
        return self._library.asked(self._handle, function, kinds, *([] if of is None else [c_size_t(of)]))

    def close(self) -> None:
        """Frees the container. Safe to call twice."""
        if self._handle:
            self._library.delete(self._handle)
            self._handle = c_void_p()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


def _library_of(package: Path, signature: str) -> bytes:
    """The shared library in a package."""
    try:
        with zipfile.ZipFile(package) as archive:
            names = archive.namelist()
            libraries = [name for name in names if name.endswith(".so")]
            said = {_said(archive, name) for name in names if name.endswith("wrapper_metadata.json")}
            if len(libraries) != 1:
                raise ArtifactError(f"{package} holds {len(libraries)} libraries, not 1; compile the model again")
            if said != {signature}:
                raise ArtifactError(f"{package} was compiled for another model ({said}); compile the model again")
            if archive.getinfo(libraries[0]).file_size > _MAX_LIBRARY_BYTES:
                raise ArtifactError(f"{package} holds a library beyond {_MAX_LIBRARY_BYTES} bytes; compile again")
            return archive.read(libraries[0])
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ArtifactError(f"{package} is no package of AOTInductor's: {error}; compile the model again") from None


def _said(archive: zipfile.ZipFile, name: str) -> str | None:
    found = json.loads(archive.read(name))
    said = found.get("narsil") if isinstance(found, dict) else None
    return said if isinstance(said, str) else None


def _shim(name: str, *arguments: Any) -> Any:
    """A function of torch's C shim. These take a microsecond at most, so they keep the GIL (PyDLL)."""
    function = getattr(_TORCH, name)
    function.argtypes = arguments
    function.restype = c_int32
    return function


# torch's own functions take and give handles in capsules without a name.
_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = c_void_p, (ctypes.py_object, c_char_p)
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, (c_void_p, c_char_p, c_void_p)

_TORCH = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
_sizes = c_int64 * 2
_from_blob = _shim(
    "aoti_torch_create_tensor_from_blob",
    *(c_void_p, c_int64, POINTER(c_int64), POINTER(c_int64), c_int64, c_int32, c_int32, c_int32, POINTER(c_void_p)),
)
_data_ptr = _shim("aoti_torch_get_data_ptr", c_void_p, POINTER(c_void_p))
_numel = _shim("aoti_torch_get_numel", c_void_p, POINTER(c_int64))
_dtype = _shim("aoti_torch_get_dtype", c_void_p, POINTER(c_int32))
_delete = _shim("aoti_torch_delete_tensor_object", c_void_p)
_FLOAT32 = int(_shim("aoti_torch_dtype_float32")())
_CPU = int(_shim("aoti_torch_device_type_cpu")())


def _lent(data: int, rows: int, columns: int) -> int | None:
    """The handle of a (rows, columns) float32 tensor over memory that stays its owner's."""
    handle = c_void_p()
    if _from_blob(data, 2, _sizes(rows, columns), _sizes(columns, 1), 0, _FLOAT32, _CPU, 0, byref(handle)):
        raise ForwardFailed("torch refused an input of the compiled model; see standard error")
    return handle.value


def _taken(handle: int | None, rows: int, columns: int) -> Floats:
    """The (rows, columns) float32 numbers of an output, whose handle is deleted."""
    try:
        data, count, kind = c_void_p(), c_int64(), c_int32()
        if _data_ptr(handle, byref(data)) or _numel(handle, byref(count)) or _dtype(handle, byref(kind)):
            raise ForwardFailed("the compiled model's output cannot be read; see standard error")
        if count.value != rows * columns or kind.value != _FLOAT32:
            raise ForwardFailed(f"the compiled model gave {count.value} scores for {rows} rows")
        result = np.empty((rows, columns), dtype=np.float32)
        ctypes.memmove(result.ctypes.data, data, result.nbytes)
        return result
    finally:
        _delete(handle)

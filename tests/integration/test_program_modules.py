"""Each module of the program's can be the first that is imported, and what reads an operation is one function."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import narsil.program
from narsil.program import reader, reading

MODULES = sorted(path.stem for path in Path(narsil.program.__file__).parent.glob("[!_]*.py"))

# In one interpreter, since torch takes seconds to import; Narsil's own modules are forgotten before each.
EACH_FIRST = """
import importlib, sys, traceback
import torch
for name in sys.argv[1:]:
    for known in [module for module in sys.modules if module.partition(".")[0] == "narsil"]:
        del sys.modules[known]
    try:
        importlib.import_module("narsil.program." + name)
    except Exception:
        print(name, traceback.format_exc())
"""


def test_any_of_them_can_be_imported_first():
    done = subprocess.run(
        [sys.executable, "-c", EACH_FIRST, *MODULES], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == ""


def test_every_module_that_reads_operations_is_among_the_readers():
    """Otherwise what it reads would be known after some imports and unknown after others."""
    assert {function.__module__ for function in reader.READERS.values()} <= {one.__name__ for one in reading.READERS}


def test_a_second_reader_of_an_operation_is_refused_by_the_operation_s_name():
    before = dict(reader.READERS)
    with pytest.raises(ValueError, match=r"two readers for aten\.bmm"):
        reader.reads("aten.bmm")(lambda reading, operation: None)
    assert before == reader.READERS

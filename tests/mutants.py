"""Mutation testing of the core: small faults planted one at a time, each of which the unit tests ought to notice.

``python -m tests.mutants`` lists every mutant of the files in CORE, draws them in an order that a seed gives, and
runs each against its file's tests until the time is spent. It prints the share that the tests noticed, and what
survived. The package is copied once per worker (links, but for the file that is changed): the one in use is never
touched. Each run is a fork of this process, which has imported the tests' libraries and nothing of Narsil's.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "narsil"
UNIT = ROOT / "tests" / "unit"
ENGINE = [
    "test_engine.py", "test_engine_source.py", "test_backlog.py", "test_observer.py", "test_catalog.py",
    "test_independence.py",
]  # fmt: skip

# File -> the tests that ought to notice, those that most likely do first.
CORE = {
    "dataflow.py": ["test_dataflow.py", "test_collate_split.py", "test_observer.py", "test_engine.py"],
    "engine/backlog.py": ["test_backlog.py", *ENGINE],
    "engine/collate.py": ["test_collate_split.py", "test_native_decode.py", "test_engine.py"],
    "engine/engine.py": ENGINE,
    "engine/served_model.py": ["test_catalog.py", *ENGINE],
    "engine/lane.py": ["test_lane.py", *ENGINE],
    "engine/queue.py": ["test_queue.py", *ENGINE],
    "engine/runner.py": ["test_runner.py", *ENGINE],
    "engine/scheduler.py": ["test_scheduler.py", "test_backlog.py", "test_engine.py"],
    "engine/split.py": ["test_collate_split.py", "test_engine.py"],
    "transports/validate.py": ["test_codec_predictor.py", "test_predictor_widths.py", "test_codec_narsil.py"],
    "transports/codec/predictor.py": ["test_codec_predictor.py", "test_predictor_widths.py"],
    "transports/codec/narsil_v1.py": ["test_codec_narsil.py"],
    "transports/codec/oip.py": ["test_codec_oip.py"],
    "transports/codec/tensors.py": ["test_codec_tensors.py"],
    "wire.py": ["test_wire.py", "test_codec_predictor.py", "test_codec_narsil.py"],
    "artifacts/rows.py": ["test_rows.py"],
    "compile/calibration.py": ["test_calibration.py"],
    "compile/gate.py": ["test_gate.py"],
}

COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


PATIENCE_S = 10  # what must happen in a test happens within milliseconds, or does not
PRELOADED = ("grpc", "hypothesis.strategies", "numpy.testing")  # in the parent, so that no child has to


@dataclass(frozen=True)
class Mutant:
    """One fault: bytes start .. stop - 1 of a file become ``text``."""

    file: str  # beneath src/narsil
    line: int
    start: int
    stop: int
    was: str
    text: str

    def __str__(self) -> str:
        was, text = (" ".join(piece.split()) for piece in (self.was, self.text))
        return f"{self.file}:{self.line}: {was[:100]}  ->  {text[:100]}"

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.stop :]


class Faults(ast.NodeVisitor):
    """Gathers the mutants of one file. Left alone: annotations and the numbers beside them, decorators, docstrings,
    texts, and what is logged."""

    def __init__(self, file: str, source: bytes) -> None:
        self.mutants: list[Mutant] = []
        self._file = file
        self._source = source
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self.visit(ast.parse(source))

    def _place(self, node: ast.expr | ast.stmt, text: str) -> None:
        start = self._lines[node.lineno - 1] + node.col_offset
        stop = self._lines[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        was = self._source[start:stop].decode()
        self.mutants.append(Mutant(self._file, node.lineno, start, stop, was, text))

    def _become(self, node: ast.expr, **fields: object) -> None:
        """The same expression with other parts."""
        parts = {name: getattr(node, name) for name in node._fields}
        self._place(node, f"({ast.unparse(type(node)(**{**parts, **fields}))})")

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if node.name == "__repr__":
            return
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if not any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases):
            for statement in node.body:
                self.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if "__slots__" in names or "__all__" in names:
            return
        if isinstance(node.targets[0], ast.Attribute | ast.Subscript):
            self._place(node, "pass")
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None and any(isinstance(part, ast.Name | ast.Call) for part in ast.walk(node.value)):
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._place(node, "pass")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        if not ast.unparse(node.value).startswith("log."):
            self._place(node, "pass")
            self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._place(node, "pass")

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not isinstance(node.value, ast.Constant):
            self._place(node.value, "None")
            self._place(node.value, "0")
        self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.While) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            return
        self._place(node.test, "True")
        self._place(node.test, "False")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for at, operator in enumerate(node.ops):
            other = COMPARED[type(operator)]()
            self._become(node, ops=[*node.ops[:at], other, *node.ops[at + 1 :]])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in COMPUTED and "f'" not in ast.unparse(node):
            self._become(node, op=COMPUTED[type(node.op)]())
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self._become(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._place(node, f"({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._place(node, str(not node.value))
        elif isinstance(node.value, int | float):
            self._place(node, f"({node.value} + 1)")

    def visit_Break(self, node: ast.Break) -> None:
        self._place(node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._place(node, "break")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass


def mutants_of(file: str) -> list[Mutant]:
    """Every mutant of this file that still is Python."""
    source = (SOURCE / file).read_bytes()

    def parses(mutant: Mutant) -> bool:
        try:
            compile(mutant.applied(source), file, "exec")
        except SyntaxError:
            return False
        return True

    return [mutant for mutant in Faults(file, source).mutants if parses(mutant)]


class Run:
    """A child process over a copy of the package with one mutant, or with none."""

    def __init__(self, folder: Path, file: str, mutant: Mutant | None, seconds: float) -> None:
        self.mutant = mutant
        self.file = file
        self.folder = folder
        self.until = time.monotonic() + seconds
        self._target = folder / "narsil" / file
        source = (SOURCE / file).read_bytes()
        self._target.unlink()
        self._target.write_bytes(source if mutant is None else mutant.applied(source))
        self.ended, inherited = os.pipe()  # the reading end is ready once the child is gone
        self._pid = os.fork()
        if not self._pid:
            os.close(self.ended)
            _test(folder, file)  # never comes back
        os.close(inherited)

    def notices(self) -> bool:
        """Whether a test failed, or did not end in time. Ends the child, and takes the mutant away."""
        late = not select.select([self.ended], [], [], 0)[0]
        if late:
            os.killpg(self._pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self.ended)
        self._target.unlink()
        self._target.symlink_to(SOURCE / self.file)
        # 2: the mutated file cannot be imported. Below 0: the interpreter did not survive it.
        if code not in (0, 1, 2) and code >= 0:
            raise RuntimeError(f"the tests of {self.file} ended with {code}; see {self.folder / 'output'}")
        return late or code != 0


def _test(folder: Path, file: str) -> NoReturn:
    """In the child: runs the tests of this file over the package in this folder."""
    os.setsid()
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    os.environ["TEST_PATIENCE_S"] = str(PATIENCE_S)
    tests = [str(UNIT / name) for name in dict.fromkeys(CORE[file]) if (UNIT / name).exists()]
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "--rootdir", str(ROOT)]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what the parent has imported
    code = pytest.main([*options, *tests])
    sys.stdout.flush()
    os._exit(code)


def copy_of_the_package(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subprocess.run(["cp", "-rs", str(SOURCE), str(folder / "narsil")], check=True)
    return folder


@dataclass
class Score:
    """Of one file."""

    noticed: int = 0
    ran: int = 0
    known: int = 0

    def __str__(self) -> str:
        share = f"{self.noticed / self.ran:6.1%}" if self.ran else "   none"
        return f"{share}  {self.noticed:4} of {self.ran:4} mutants noticed; there are {self.known}"


def drawn(files: list[str], seed: int) -> Iterator[Mutant]:
    """Mutants of all files in turn, each file's own in an order that the seed gives: every file has its share."""
    dice = random.Random(seed)
    piles = {file: mutants_of(file) for file in files}
    for pile in piles.values():
        dice.shuffle(pile)
    everything = [(number / len(pile), mutant) for pile in piles.values() for number, mutant in enumerate(pile)]
    return (mutant for _, mutant in sorted(everything, key=lambda one: one[0]))


def seconds_without_a_mutant(folder: Path, file: str) -> float:
    """How long the tests of this file take. Raises RuntimeError where they fail."""
    began = time.monotonic()
    run = Run(folder, file, None, 600)
    select.select([run.ended], [], [], 600)
    if run.notices():
        raise RuntimeError(f"the tests of {file} fail without a mutant; see {folder / 'output'}")
    return time.monotonic() - began


def measure(files: list[str], seed: int, seconds: float, workers: int) -> tuple[dict[str, Score], list[Mutant]]:
    """Runs mutants until the time is spent: the score of each file, and what survived."""
    folders = [copy_of_the_package(ROOT / "build" / "mutants" / str(number)) for number in range(workers)]
    limits = {file: 20 + 10 * seconds_without_a_mutant(folders[0], file) for file in files}
    scores = {file: Score(known=len(mutants_of(file))) for file in files}
    survivors: list[Mutant] = []
    queue, until = drawn(files, seed), time.monotonic() + seconds
    running: list[Run] = []
    while True:
        while folders and time.monotonic() < until and (mutant := next(queue, None)) is not None:
            running.append(Run(folders.pop(), mutant.file, mutant, limits[mutant.file]))
        if not running:
            return scores, survivors
        patience = max(0.0, min(run.until for run in running) - time.monotonic())
        ended = select.select([run.ended for run in running], [], [], patience)[0]
        for run in [one for one in running if one.ended in ended or one.until <= time.monotonic()]:
            running.remove(run)
            folders.append(run.folder)
            noticed = run.notices()
            scores[run.file].ran += 1
            scores[run.file].noticed += noticed
            if not noticed and run.mutant is not None:
                survivors.append(run.mutant)
                print("survived:", run.mutant, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="how long to go on; what has begun is finished")
    parser.add_argument("--seed", type=int, default=1, help="of the order in which mutants are drawn")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--floor", type=float, default=0, help="the share noticed, in percent, below which this fails")
    parser.add_argument("files", nargs="*", help="files beneath src/narsil; all of the core without them")
    given = parser.parse_args()
    files = given.files or list(CORE)
    if unknown := sorted(set(files) - set(CORE)):
        sys.exit(f"{', '.join(unknown)}: not among the files of the core: {', '.join(CORE)}")
    for library in PRELOADED:
        import_module(library)
    scores, survivors = measure(files, given.seed, given.seconds, given.workers)
    total = Score()
    for file, score in scores.items():
        print(f"{file:28} {score}")
        total.noticed, total.ran, total.known = (
            total.noticed + score.noticed,
            total.ran + score.ran,
            total.known + score.known,
        )
    print(f"{'all':28} {total}")
    print("\nSurvivors:" if survivors else "\nNone survived.")
    for mutant in sorted(survivors, key=lambda one: (one.file, one.line)):
        print(f"  {mutant}")
    if total.noticed < total.ran * given.floor / 100:
        sys.exit(f"fewer than {given.floor:g}% were noticed")


if __name__ == "__main__":
    main()

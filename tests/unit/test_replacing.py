"""Putting a new folder in the place of an earlier one: whole, wherever it lies and however the run ends, and nobody
else's files touched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from narsil.artifacts import replacing as module
from narsil.artifacts.artifact import MANIFEST, NEWER, open_artifact, write_manifest
from narsil.artifacts.replacing import check_out, replacing
from narsil.artifacts.schema import Feature, ModelSchema
from narsil.errors import ArtifactError

SCHEMA = ModelSchema(1, (Feature("user", "t_user", 3, 4),))


def write(folder: Path, name: str, extra: str | None = None) -> None:
    """An artifact of that name, whose files' contents it is too; ``extra`` is one more of them."""
    folder.mkdir(exist_ok=True)
    files = {"onnx": folder / "graph.onnx", "onnx_data": folder / (extra or "graph.onnx.data")}
    for file in files.values():
        file.write_text(name)
    write_manifest(folder, name=name, version="1", schema=SCHEMA, device="cpu", files=files, architecture={})


def package(out: Path, name: str, extra: str | None = None, meanwhile: Callable[[], object] = lambda: None) -> None:
    with replacing(out) as staging:
        write(staging, name, extra)
        meanwhile()


def name_in(out: Path) -> str:
    """The name of the artifact there, of which every file is whole."""
    artifact = open_artifact(out)
    assert not artifact.damage
    assert artifact.onnx is not None
    assert artifact.onnx.read_text() == artifact.name
    return artifact.name


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "model"


@pytest.fixture(params=["beside", "inside", "inside, without links", "beside, without exchange"])
def way(request: pytest.FixtureRequest, out: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every way of replacing; ``out`` is there."""
    out.mkdir(parents=True)
    if request.param == "beside, without exchange":
        monkeypatch.setattr(module, "_exchange", lambda *_: False)
    if request.param.startswith("inside"):
        monkeypatch.setattr(module, "_mount_points", lambda: {out})
        before = out.stat().st_ino
    if request.param == "inside, without links":
        monkeypatch.setattr(os, "link", refuse)
    yield request.param
    if request.param.startswith("inside"):
        assert out.stat().st_ino == before, "a folder that is mounted cannot be renamed"


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_the_new_folder_takes_the_place_of_the_old_one(out, way):
    for name, extra in (("first", "first.data"), ("second", None), ("third", None)):
        package(out, name, extra)
        assert name_in(out) == name
    assert list(out.parent.iterdir()) == [out]
    if way != "inside, without links":
        assert {entry.name for entry in out.iterdir()} == {MANIFEST, "graph.onnx", "graph.onnx.data"}


def test_a_failed_block_leaves_the_old_folder(out, way):
    package(out, "old")
    before = sorted(out.rglob("*"))
    with pytest.raises(ZeroDivisionError), replacing(out) as staging:
        write(staging, str(1 / 0))
    assert name_in(out) == "old"
    assert sorted(out.rglob("*")) == before
    assert list(out.parent.iterdir()) == [out]


def test_what_does_not_open_as_an_artifact_never_takes_the_place_of_one_that_does(out, way):
    package(out, "old")
    with pytest.raises(ArtifactError, match="name is not made of"):
        package(out, "a bad name")
    with pytest.raises(ArtifactError, match=r"has neither manifest\.json"), replacing(out):
        pass
    assert name_in(out) == "old"


@pytest.mark.parametrize("meanwhile", [True, False], ids=["meanwhile", "before"])
def test_other_peoples_files_are_kept(out, way, meanwhile):
    def add() -> None:
        (out / "thesis.tex").write_text("years of work")

    package(out, "old")
    if not meanwhile:
        add()
    with pytest.raises(ArtifactError, match=r"holds thesis\.tex"):
        package(out, "new", meanwhile=add)
    assert (out / "thesis.tex").read_text() == "years of work"
    assert name_in(out) == "old"


def test_a_volume_of_its_own_may_have_what_file_systems_put_there(out, monkeypatch):
    (out / "lost+found").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"holds lost\+found"):
        check_out(out)
    monkeypatch.setattr(module, "_mount_points", lambda: {out})
    package(out, "new")
    assert (out / "lost+found").is_dir()


def test_two_at_a_time_write_to_folders_of_their_own_and_the_last_one_stays(out, way):
    package(out, "old")
    with replacing(out) as late:
        write(late, "late")
        with replacing(out) as early:
            assert early != late
            write(early, "early")
        assert name_in(out) == "early"
        assert (late / MANIFEST).exists()
    assert name_in(out) == "late"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("left", ["old", "theirs"])
def test_a_failed_rename_leaves_one_whole_folder(out, monkeypatch, left):
    package(out, "old")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name != "new":
            return rename(path, target)
        if left == "theirs":  # another process was faster
            write(out, "theirs")
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(module, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ArtifactError, match=r"cannot be written: .*Directory not empty"):
        package(out, "new")
    assert name_in(out) == left
    assert list(out.parent.iterdir()) == [out]


# -- where OUT lies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_and_what_it_leads_to_is_replaced(out, dangling):
    out.parent.mkdir()
    link = out.with_name("current")
    link.symlink_to(out.name)
    if not dangling:
        package(out, "old")
    package(link, "new")
    assert link.is_symlink()
    assert os.readlink(link) == "model"
    assert name_in(out) == name_in(link) == "new"
    assert sorted(entry.name for entry in out.parent.iterdir()) == ["current", "model"]


def test_a_link_that_leads_back_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ArtifactError, match=r"leads back to itself|cannot be written"):
        check_out(tmp_path / "loop")


@pytest.mark.parametrize("name", [".", "../model", "absolute"])
def test_the_working_directory_stays_what_it_was(out, monkeypatch, name):
    out.mkdir(parents=True)
    monkeypatch.chdir(out)
    before = os.stat(".").st_ino
    for artifact in ("first", "second"):
        package(out if name == "absolute" else Path(name), artifact)
        assert os.stat(".").st_ino == out.stat().st_ino == before
        assert name_in(Path()) == artifact
    assert list(out.parent.iterdir()) == [out]
    assert sorted(os.listdir(".")) == ["graph.onnx", "graph.onnx.data", MANIFEST]


def test_a_parent_that_may_not_be_written_to_is_no_hindrance(out, monkeypatch):
    out.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != out.parent)
    with replacing(out) as staging:
        assert staging.is_relative_to(out)
        write(staging, "new")
    assert name_in(out) == "new"


def test_a_sticky_parent_in_which_another_owns_the_folder_lets_nobody_rename_it(out, monkeypatch):
    out.mkdir(parents=True)
    out.parent.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: out.stat().st_uid + 1)
    assert module._is_fixed(out)
    monkeypatch.setattr(os, "geteuid", lambda: out.stat().st_uid)
    assert not module._is_fixed(out)


def namespaces() -> list[list[str]]:
    """What runs a command with mounts of its own: as root, or as root of a user namespace."""
    ways = [["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]]
    return [
        way
        for way in ways
        if shutil.which("unshare") and not run([*way, "mount", "--bind", "/proc", "/proc"]).returncode
    ]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


MOUNTED = """
import sys
from pathlib import Path
from tests.unit.test_replacing import name_in, package

out = Path(sys.argv[1])
for name in ("first", "second"):
    package(out, name)
    assert name_in(out) == name
"""


@pytest.mark.parametrize("name", ["model", "with space"])
def test_a_mounted_folder_is_replaced_from_within(tmp_path, name):
    """A real mount, of a folder of the same file system."""
    out, volume = tmp_path / name, tmp_path / "volume"
    out.mkdir()
    volume.mkdir()
    ways = namespaces()
    if not ways:
        pytest.skip("no mounts in a namespace of one's own here")
    script = 'mount --bind "$1" "$2" && exec "$3" -c "$4" "$2"'
    done = run([*ways[0], "sh", "-c", script, "sh", str(volume), str(out), sys.executable, MOUNTED])
    assert done.returncode == 0, done.stderr
    assert name_in(volume) == "second"
    assert sorted(entry.name for entry in volume.iterdir()) == ["graph.onnx", "graph.onnx.data", MANIFEST]
    assert not any(out.iterdir())


def test_out_is_looked_at_before_the_work_and_nothing_is_left_behind(out, monkeypatch):
    check_out(out)
    file = out.parent / "file"
    file.write_text("x")
    with pytest.raises(ArtifactError, match="is a file; give the folder"):
        check_out(file)
    with pytest.raises(ArtifactError, match="cannot be written: Not a directory"):
        check_out(file / "model")
    assert list(out.parent.iterdir()) == [file]
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ArtifactError, match="model cannot be written: Operation not permitted"), replacing(out):
        pytest.fail("the block is not run")


# -- killed ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a process: nothing that it would do afterwards happens."""


STEPS = ("rename", "replace", "link", "unlink", "rmdir")  # of os; all that changes anything once the block has ended


def killed(out: Path, steps: int) -> bool:
    """Packages anew, and is killed before its step of that number; False where there are no more."""
    left = [steps]

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **options: object) -> object:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return call(*arguments, **options)

        return step

    with pytest.MonkeyPatch.context() as patch:

        def begin() -> None:
            for name in STEPS:
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr(module, "_exchange", counted(module._exchange))

        try:
            package(out, "new", meanwhile=begin)
        except Killed:
            return True
        return False


def test_a_run_that_is_killed_at_any_step_leaves_the_old_or_the_new_and_the_next_one_cleans_up(out, way):
    seen = set()
    for steps in range(100):
        package(out, "old", "old.data")
        if not killed(out, steps):
            break
        if way != "beside, without exchange":  # which has a moment without OUT
            seen.add(name_in(out))
        check_out(out)
        seen.add(name_in(out))
        assert list(out.parent.iterdir()) == [out]
        if way == "inside, without links":
            assert {entry.name for entry in out.iterdir()} <= {NEWER, MANIFEST, "graph.onnx", "old.data"}
        else:
            data = "old.data" if name_in(out) == "old" else "graph.onnx.data"
            assert {entry.name for entry in out.iterdir()} == {MANIFEST, "graph.onnx", data}
    assert seen == {"old", "new"}
    assert 3 < steps < 99


DIES = """
import os, signal, sys
from pathlib import Path
from narsil.artifacts import replacing

out = Path(sys.argv[1])
if sys.argv[2] == "inside":
    replacing._mount_points = lambda: {out}
with replacing.replacing(out) as staging:
    (staging / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_what_a_killed_process_leaves_is_swept_away_by_the_next_one(out, where):
    package(out, "old")
    assert run([sys.executable, "-c", DIES, str(out), where]).returncode == -signal.SIGKILL
    assert len(list(out.parent.rglob("*.partial/new/weights"))) == 1
    check_out(out)
    assert not list(out.parent.rglob("*.partial"))
    assert name_in(out) == "old"


def test_a_folder_that_only_looks_like_a_partial_one_is_not_touched(out):
    out.parent.mkdir()
    stranger = out.parent / ".narsil.0123abcd.partial"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years of work")  # no lock: whose it is, nobody knows
    elsewhere = out.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").write_text("model")
    (out.parent / ".narsil.ffffffff.partial").symlink_to(elsewhere)
    package(out, "new")
    assert (stranger / "thesis.tex").exists()
    assert (elsewhere / "lock").exists()

"""What a killed writer leaves behind goes away, what a living one is writing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from fulmen.storage.atomic import (
    finish_interrupted_rename,
    locked_folder,
    remove_leftovers,
    remove_whole,
    replace_folder,
    temporary_name,
)
from fulmen.storage.filesystem import atomic_write

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")


def killed_while(act):
    """Runs it in a child that is then killed; gives the child's id."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    return child


def die(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_one_file_and_cleaning_removes_it(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"old")
    killed_while(lambda: atomic_write(tmp_path / "a.ckpt", die))
    [left] = [name for name in os.listdir(tmp_path) if name != "a.ckpt"]
    assert remove_leftovers(str(tmp_path)) == [left] and remove_leftovers(str(tmp_path)) == []
    assert os.listdir(tmp_path) == ["a.ckpt"] and (tmp_path / "a.ckpt").read_bytes() == b"old"


def test_a_living_writer_keeps_its_file(tmp_path):
    def write(file):
        file.write(b"new")
        child = os.fork()  # somebody else starts in the same folder
        if child == 0:
            code = 99
            try:
                code = len(remove_leftovers(str(tmp_path)))
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0

    atomic_write(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_a_lock_protects_a_writer_whose_process_cannot_be_seen(tmp_path):
    """As in another container: the name says nothing, the lock does."""
    name = temporary_name(str(tmp_path / "a")).replace(f"-{os.getpid()}-", "-999999999-")
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        assert remove_leftovers(str(tmp_path)) == [] and os.path.exists(name)
        writer.stdin.write(b"\n")
    assert remove_leftovers(str(tmp_path)) == [os.path.basename(name)]


def test_another_process_with_the_same_id_is_not_the_writer(tmp_path):
    name = temporary_name(str(tmp_path / "a"))
    start = os.path.basename(name).rsplit("-", 2)[1]
    if start == "0":
        pytest.skip("this system does not tell when a process started")
    (tmp_path / os.path.basename(name)).touch()
    assert remove_leftovers(str(tmp_path)) == []  # it is ours
    os.rename(name, name.replace(f"-{start}-", f"-{int(start) - 1}-"))
    assert len(remove_leftovers(str(tmp_path))) == 1


def test_a_file_of_another_machine_goes_when_it_is_quiet_for_long(tmp_path):
    name = temporary_name(str(tmp_path / "a"))
    host = os.path.basename(name).split(".")[2][:8]
    other = name.replace(host, "0" * 8)
    open(other, "w").close()
    assert remove_leftovers(str(tmp_path)) == []
    os.utime(other, (time.time() - 7200,) * 2)
    assert remove_leftovers(str(tmp_path)) == [os.path.basename(other)]


@pytest.mark.parametrize("name", [".a.tmp", "a.tmp", ".a.0123456789ab.tmp", ".hidden", "a.ckpt", ".a.ckpt.old"])
def test_files_of_others_are_left_alone(tmp_path, name):
    (tmp_path / name).touch()
    os.utime(tmp_path / name, (0, 0))
    assert remove_leftovers(str(tmp_path)) == [] and os.listdir(tmp_path) == [name]


def test_cleaning_a_folder_that_is_not_there_or_remote_does_nothing(tmp_path):
    assert remove_leftovers(str(tmp_path / "missing")) == [] and remove_leftovers("memory://box") == []


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
    for name in ("x" * 250 + ".ckpt", "ü" * 120):
        atomic_write(tmp_path / name, b"1")
    assert len(os.listdir(tmp_path)) == 2


# ---------------------------------------------------------------------- folders


def folder_with(path, text):
    path.mkdir()
    (path / "part").write_text(text)
    return path


def rewrite_folder(target, text, stop_before=None):
    """What a checkpoint in a folder does, up to a call of `os` before which the process is killed."""
    new = temporary_name(str(target))
    renames = []

    def kill(event, arguments):
        if event == "os.rename":
            renames.append(event)
        if stop_before in (f"rename {len(renames)}" if event == "os.rename" else "", event):
            os.kill(os.getpid(), signal.SIGKILL)

    with locked_folder(new):
        with open(os.path.join(new, "part"), "w") as file:
            file.write(text)
        sys.addaudithook(kill)
        replace_folder(new, str(target))


@pytest.mark.parametrize(
    ("moment", "expected"), [("rename 1", "old"), ("rename 2", "new"), ("shutil.rmtree", "new"), (None, "new")]
)
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_one_or_the_new_one(tmp_path, moment, expected):
    target = folder_with(tmp_path / "x.ckpt", "old")
    killed_while(lambda: rewrite_folder(target, "new", moment))
    finish_interrupted_rename(str(target))  # who looks for it finds it, also between the two renames
    assert (target / "part").read_text() == expected
    remove_leftovers(str(tmp_path))
    assert os.listdir(tmp_path) == ["x.ckpt"] and (target / "part").read_text() == expected


def test_a_folder_that_cannot_be_replaced_stays(tmp_path):
    target, renames = folder_with(tmp_path / "x.ckpt", "old"), []

    def fail(event, arguments):
        if event == "os.rename":
            renames.append(arguments)
            if len(renames) == 2:
                raise PermissionError("not now")

    if (child := os.fork()) == 0:
        new, code = temporary_name(str(target)), 1
        sys.addaudithook(fail)
        try:
            with pytest.raises(PermissionError), locked_folder(new):
                replace_folder(new, str(target))
            code = 0 if os.listdir(tmp_path) == ["x.ckpt"] and (target / "part").read_text() == "old" else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("moment", ["os.rename", "shutil.rmtree", "os.remove", "os.rmdir"])
def test_a_kill_while_a_folder_is_removed_leaves_all_of_it_or_nothing(tmp_path, moment):
    target = folder_with(tmp_path / "x.ckpt", "old")
    (target / "other part").touch()

    def remove_until():
        sys.addaudithook(lambda event, _: os.kill(os.getpid(), signal.SIGKILL) if event == moment else None)
        remove_whole(str(target))

    killed_while(remove_until)
    assert target.exists() is (moment == "os.rename")
    if target.exists():
        assert sorted(os.listdir(target)) == ["other part", "part"]
    remove_leftovers(str(tmp_path))
    assert os.listdir(tmp_path) == (["x.ckpt"] if moment == "os.rename" else [])


def test_a_folder_that_fails_is_gone(tmp_path):
    with pytest.raises(OSError, match="full"), locked_folder(str(tmp_path / "new")):
        raise OSError("disk full")
    assert os.listdir(tmp_path) == []

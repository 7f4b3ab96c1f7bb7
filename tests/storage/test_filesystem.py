import os
import subprocess
import sys
from pathlib import Path

import pytest

import fulmen
from fulmen.storage.filesystem import atomic_write, ensure_dir, get_filesystem, is_remote


def run_python(code: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(Path(fulmen.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code], env=environment).returncode


def test_urls_are_remote_and_paths_are_not(tmp_path):
    assert is_remote("s3://bucket/a") and is_remote("memory://a")
    assert not is_remote(tmp_path) and not is_remote("file:///tmp/a") and not is_remote("C:\\a")


def test_local_paths_need_no_fsspec(tmp_path):
    code = f"""
import sys
from fulmen.storage.filesystem import atomic_write, get_filesystem
atomic_write({str(tmp_path / "a")!r}, b"1")
assert get_filesystem({str(tmp_path)!r}).exists({str(tmp_path / "a")!r})
assert "fsspec" not in sys.modules
"""
    assert run_python(code) == 0


def test_local_files_are_listed_measured_and_removed(tmp_path):
    files = get_filesystem(tmp_path)
    ensure_dir(tmp_path / "a" / "b")
    atomic_write(tmp_path / "a" / "x.txt", b"abc")
    assert files.ls(tmp_path / "a") == [str(tmp_path / "a" / "b"), str(tmp_path / "a" / "x.txt")]
    assert files.size(tmp_path / "a" / "x.txt") == 3 and files.isfile(f"file://{tmp_path}/a/x.txt")
    files.rm(tmp_path / "a", recursive=True)
    assert not files.exists(tmp_path / "a") and files.isdir(tmp_path)


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    get_filesystem(tmp_path).rm(tmp_path / "link", recursive=True)
    assert (tmp_path / "real").is_dir() and not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("make_path", [lambda tmp: str(tmp / "file"), lambda tmp: "memory://fulmen/file"])
def test_a_failing_write_leaves_the_old_file(tmp_path, make_path):
    path = make_path(tmp_path)
    if is_remote(path):
        pytest.importorskip("fsspec")
    files = get_filesystem(path)
    ensure_dir(os.path.dirname(path))
    atomic_write(path, b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    with files.open(path, "rb") as file:
        assert file.read() == b"old"
    assert len(files.ls(os.path.dirname(path), detail=False)) == 1
    atomic_write(path, lambda file: file.write(b"new"))
    with files.open(path, "rb") as file:
        assert file.read() == b"new"


def test_a_killed_write_leaves_the_old_file(tmp_path):
    code = f"""
import os
from fulmen.storage.filesystem import atomic_write
def die(file):
    file.write(b"half"); file.flush(); os._exit(9)
atomic_write({str(tmp_path / "a")!r}, die)
"""
    (tmp_path / "a").write_bytes(b"old")
    assert run_python(code) == 9
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX systems")
def test_new_files_have_usual_permissions_and_replace_links(tmp_path):
    (tmp_path / "best").write_bytes(b"best")
    (tmp_path / "last").symlink_to(tmp_path / "best")
    atomic_write(tmp_path / "last", b"last")
    assert (tmp_path / "best").read_bytes() == b"best" and not (tmp_path / "last").is_symlink()
    (tmp_path / "usual").touch()
    assert (tmp_path / "last").stat().st_mode == (tmp_path / "usual").stat().st_mode

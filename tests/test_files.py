"""What is written where: modes, links, devices, pipes, descriptors, and files that cannot be replaced."""

import os
import shutil
import socket
import stat
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from progtuning.base.errors import InputError, RunError
from progtuning.base.files import (
    check_new_folder,
    check_no_input,
    check_output_file,
    made_folder,
    own_descriptor,
    replacing,
    write_text,
)

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes a device, or becomes another user")


@pytest.fixture(autouse=True)
def umask():
    old = os.umask(0o022)
    yield
    os.umask(old)


@pytest.fixture
def public():
    """A new folder that every user may enter and read; pytest's own are for one user alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def another_user():
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_a_new_file_has_the_mode_that_the_umask_leaves_even_where_a_library_makes_it_private(mask, tmp_path):
    os.umask(mask)
    write_text(tmp_path / "text", "x")
    with replacing(tmp_path / "tensors") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT, 0o600))
    assert mode(tmp_path / "text") == mode(tmp_path / "tensors") == 0o666 & ~mask


def test_a_replaced_file_keeps_its_mode_and_is_a_new_one_so_that_its_hard_links_keep_what_they_had(tmp_path):
    target = tmp_path / "page"
    target.write_text("old")
    target.chmod(0o640)
    os.link(target, tmp_path / "backup")
    write_text(target, "new")
    assert (target.read_text(), mode(target), (tmp_path / "backup").read_text()) == ("new", 0o640, "old")


@as_root
def test_a_replaced_file_keeps_its_owner_and_group(tmp_path):
    target = tmp_path / "page"
    target.write_text("old")
    os.chown(target, 1234, 2345)
    write_text(target, "new")
    assert (target.stat().st_uid, target.stat().st_gid, target.read_text()) == (1234, 2345, "new")


@pytest.mark.parametrize("old", ["old", None])
def test_links_are_written_through_and_stay(old, tmp_path):
    (tmp_path / "deep").mkdir()
    target, link, outer = tmp_path / "deep" / "target", tmp_path / "link", tmp_path / "outer"
    link.symlink_to(Path("deep", "target"))
    outer.symlink_to(link)
    if old:
        target.write_text(old)
    write_text(outer, "new")
    assert link.is_symlink() and outer.is_symlink() and not target.is_symlink() and target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_failed_write_leaves_the_target_of_a_link_and_nothing_beside(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(RuntimeError, match="broken"), replacing(tmp_path / "link") as temporary:
        temporary.write_text("half")
        raise RuntimeError("broken")
    assert (tmp_path / "target").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_a_pipe_gets_the_bytes_and_stays(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_text(pipe, "row\n" * 50_000)
    reader.join(timeout=10)  # where the pipe was replaced it would wait for ever
    assert got == [b"row\n" * 50_000] and pipe.is_fifo()


@as_root
def test_a_device_gets_the_bytes_and_stays_and_a_full_one_is_an_error_that_names_it(tmp_path):
    for name, minor in (("null", 3), ("full", 7)):
        try:
            os.mknod(tmp_path / name, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        except PermissionError:
            pytest.skip("this system lets nobody make a device")
    write_text(tmp_path / "null", "x")
    with pytest.raises(RunError) as error:
        write_text(tmp_path / "full", "x")
    assert str(error.value) == f"{tmp_path / 'full'}: cannot be written: No space left on device"
    assert all(path.is_char_device() for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 2


def test_a_descriptor_of_this_process_is_written_where_it_stands(tmp_path):
    with open(tmp_path / "file", "w+b") as file:
        file.write(b"before\n")
        file.flush()
        (tmp_path / "link").symlink_to(f"/proc/self/fd/{file.fileno()}")
        write_text(tmp_path / "link", "one\n")
        write_text(f"/dev/fd/{file.fileno()}", "two\n")
        assert own_descriptor(tmp_path / "link") == file.fileno()
    assert (tmp_path / "file").read_bytes() == b"before\none\ntwo\n"
    assert own_descriptor("/dev/stdout") == 1 and own_descriptor(tmp_path / "file") is None
    assert own_descriptor(tmp_path / "12") is None


@as_root
def test_a_file_in_a_folder_that_takes_no_new_one_is_overwritten(public, monkeypatch):
    target, target_of_another = public / "shared", public / "sticky" / "shared"
    target_of_another.parent.mkdir()
    target_of_another.parent.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(target_of_another.parent))
    for path in (target, target_of_another):
        path.write_text("something longer")
        path.chmod(0o666)
        with another_user():
            write_text(path, "new")
        assert (path.read_text(), path.stat().st_uid, mode(path)) == ("new", 0, 0o666)
        assert len(list(path.parent.iterdir())) == 1 + (path == target)


@as_root
def test_a_file_that_is_read_only_is_not_replaced(public):
    public.chmod(0o777)
    target = public / "gold"
    target.write_text("precious")
    with another_user():
        with pytest.raises(RunError, match="gold: cannot be written: Permission denied"):
            write_text(target, "new")
        with pytest.raises(InputError, match="gold: cannot be written: Permission denied"):
            check_output_file(target)
    assert target.read_text() == "precious"


def test_a_name_may_be_as_long_as_the_system_lets_it_be(tmp_path):
    write_text(tmp_path / ("a" * 255), "x")
    write_text(tmp_path / ("é" * 127), "x")
    assert len(list(tmp_path.iterdir())) == 2


def test_an_output_that_cannot_be_written_is_refused_with_its_reason(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    reasons = {
        "": "is a folder",
        "new/": "is a folder",
        "file/x": "Not a directory",
        "loop": "Too many levels",
        "dangling": "is not a folder",
        "socket": "is a socket",
        "a" * 256: "File name too long",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=reason) as error:
            check_output_file(f"{tmp_path}/{name}")
        assert str(error.value).startswith(f"--output {tmp_path}/{name}")
    check_output_file(tmp_path / "new" / "folder" / "x")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_refused_with_its_reason_before_it_is_tried(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    reasons = {"file/x/y": "Not a directory", "dangling": "Not a directory", "a" * 256: "File name too long"}
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=reason) as error:
            check_new_folder(f"{tmp_path}/{name}")
        assert str(error.value).startswith(f"--output-dir {tmp_path}/{name} cannot be made a folder: ")
        with pytest.raises(OSError):
            Path(f"{tmp_path}/{name}").mkdir(parents=True)
    check_new_folder(tmp_path / "new" / "folder")
    check_new_folder("new")
    assert not (tmp_path / "new").exists()


def test_a_file_or_folder_without_a_name_is_refused_and_is_not_the_current_folder():
    for check in (check_output_file, check_new_folder, lambda path: made_folder(path, "--output-dir")):
        with pytest.raises(InputError, match="--output.* got no name"):
            check("")


@as_root
def test_a_folder_that_takes_no_file_is_refused_before_the_work(public):
    with another_user():
        with pytest.raises(InputError, match="--output-dir .* Permission denied"):
            check_new_folder(public / "new" / "folder")
        with pytest.raises(InputError, match="Permission denied"):
            check_output_file(public / "new" / "x")
        with pytest.raises(InputError, match="--output-dir .* Permission denied"):
            made_folder(public, "--output-dir")


def test_an_output_that_is_an_input_is_found_by_any_name(tmp_path):
    source, other = tmp_path / "in.tsv", tmp_path / "other.tsv"
    source.write_text("x")
    other.write_text("x")
    (tmp_path / "link").symlink_to("in.tsv")
    os.link(source, tmp_path / "hard")
    for name in ("in.tsv", "link", "hard", "../" + tmp_path.name + "/in.tsv"):
        with pytest.raises(InputError, match="--output .* is the same file as the input .*in.tsv"):
            check_no_input(tmp_path / name, [other, source])
    check_no_input(other, [source])
    check_no_input(tmp_path / "new.tsv", [source, tmp_path / "missing"])

"""Archives are the official ones, whole; their members are found without unpacking them."""

import hashlib

import pytest
import tensorflow_datasets as tfds
from prepare_data_test import write_tar

from triqdef_jax import archives


def test_the_checksums_are_those_that_tfds_lists():
    lists = ("url_checksums/cifar10.txt", "datasets/imagenet2012/checksums.tsv")
    listed = "".join(tfds.core.tfds_path(path).read_text() for path in lists)
    by_name = {line.split()[0].rsplit("/")[-1]: line.split()[2] for line in listed.splitlines()}
    official = [archive for known in archives.ARCHIVES.values() for archive in known.values()]
    assert {archive.file_name: archive.sha256 for archive in official} == {
        archive.file_name: by_name[archive.file_name] for archive in official
    }


def test_a_fetched_file_appears_only_when_complete_and_right(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"contents")
    digest, target = hashlib.sha256(b"contents").hexdigest(), tmp_path / "downloads/file.bin"
    with pytest.raises(ValueError, match=r"wrong checksum of .*file.bin: .*expected 0000"):
        archives.fetch(source.as_uri(), target, "0" * 64)
    assert not list(target.parent.iterdir())
    assert archives.fetch(source.as_uri(), target, digest) == target
    assert target.read_bytes() == b"contents"
    source.unlink()
    assert archives.fetch(source.as_uri(), target, digest) == target, "a file that is there is not fetched again"
    target.unlink()
    with pytest.raises(FileNotFoundError, match=r"cannot fetch file:.*; get the file and pass --archive=FILE"):
        archives.fetch(source.as_uri(), target, digest)


def test_members_of_archives_in_an_archive_are_read_in_place(tmp_path):
    files = {"a/one": b"first", "two": bytes(700)}  # 700 bytes take two blocks of 512
    inner = write_tar(tmp_path / "inner.tar", files).read_bytes()
    path = write_tar(tmp_path / "outer.tar", {"x.tar": inner, "y.tar": inner})
    folders = list(archives.members(path))
    assert [folder.name for folder in folders] == ["x.tar", "y.tar"]
    for folder in folders:
        found = list(archives.members(path, folder))
        assert {member.name: archives.read(path, member) for member in found} == files
    assert archives.contents(tmp_path / "inner.tar") == files


@pytest.mark.parametrize("kept", [512, 5 * 512 + 100])  # within the first member; within the second
def test_an_archive_that_ends_too_early_is_refused(tmp_path, kept):
    inner = write_tar(tmp_path / "inner.tar", {"one": bytes(600), "two": bytes(600)}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(inner[:kept])
    with pytest.raises(ValueError, match=r"cut.tar is no complete tar archive \(unexpected end of data\)"):
        list(archives.members(tmp_path / "cut.tar"))
    path = write_tar(tmp_path / "outer.tar", {"x.tar": inner[:kept], "y.tar": inner})
    with pytest.raises(ValueError, match=r"x.tar in .*outer.tar is no complete tar archive"):
        list(archives.members(path, next(archives.members(path))))


def test_bytes_that_vanished_since_they_were_found_are_missed(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"one": bytes(600)})
    (member,) = archives.members(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"a\.tar ends within one; download it anew"):
        archives.read(path, member)

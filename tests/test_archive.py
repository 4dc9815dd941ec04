"""Backups as files: what comes back is what went in, and nothing of any other archive is ever put in place."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.errors import ConfigError, ResourceError, StoreError
from fedlora.formats import archive
from fedlora.formats.archive import MANIFEST, read_archive, write_archive
from fedlora.formats.files import Damaged, dump_record, unfinished

FILES = {"server.key": b"secret", "runs/a/round-000001.safetensors": b"x" * 1500, "runs/a/empty": b"", "sites/n.pub": b"public"}


@pytest.fixture
def root(tmp_path):
    for name, blob in FILES.items():
        path = tmp_path / "study" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob)
        path.chmod(0o644 if name.endswith(".pub") else 0o600)
    return tmp_path / "study"


@pytest.fixture
def made(root, tmp_path):
    write_archive(tmp_path / "b.tar", root, list(FILES), {"made": 1})
    return tmp_path / "b.tar"


def there(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def members(file: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(file) as tar:
        return [(m, tar.extractfile(m).read()) for m in tar]


def packed(file: Path, entries) -> Path:
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, blob in entries:
            tar.addfile(info, io.BytesIO(blob))
    return file


def test_what_comes_back_is_what_went_in(made, root, tmp_path):
    assert made.stat().st_mode & 0o777 == 0o600
    found = read_archive(made, tmp_path / "new")
    assert there(tmp_path / "new") == FILES == there(root)
    assert (tmp_path / "new" / "sites" / "n.pub").stat().st_mode & 0o777 == 0o644
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "new").rglob("*") if p.suffix != ".pub"} == {0o600, 0o700}
    assert (found.facts, found.size) == ({"made": 1}, sum(map(len, FILES.values())))
    assert [m.name for m, _ in members(made)] == [MANIFEST, *sorted(FILES)]  # any tar reads it


def test_a_backup_is_never_written_over_and_half_of_one_is_none(made, root, tmp_path, monkeypatch):
    before = made.read_bytes()
    with pytest.raises(StoreError, match="exists"):
        write_archive(made, root, list(FILES), {})
    assert made.read_bytes() == before
    measured = archive._measured

    def changed_since(root, path):
        member = measured(root, path)
        (root / path).write_bytes(b"SECRET")
        return member

    monkeypatch.setattr(archive, "_measured", changed_since)
    with pytest.raises(StoreError, match="was changed while it was copied"):
        write_archive(tmp_path / "c.tar", root, list(FILES), {})
    assert not (tmp_path / "c.tar").exists()
    assert not unfinished(tmp_path / "c.tar").exists()


def test_what_a_log_has_grown_by_meanwhile_is_left_out(root, tmp_path, monkeypatch):
    measured = archive._measured

    def grown_since(*words):
        member = measured(*words)
        with (root / "server.key").open("ab") as file:
            file.write(b"more")
        return member

    monkeypatch.setattr(archive, "_measured", grown_since)
    write_archive(tmp_path / "c.tar", root, ["server.key"], {})
    read_archive(tmp_path / "c.tar", tmp_path / "new")
    assert there(tmp_path / "new") == {"server.key": b"secret"}


def test_links_and_names_that_no_archive_takes_are_refused_when_it_is_made(root, tmp_path):
    (root / "link").symlink_to(root / "server.key")
    with pytest.raises(StoreError, match="link"):
        write_archive(tmp_path / "c.tar", root, ["link"], {})
    (root / ("n" * 150)).write_bytes(b"")
    (root / "new\nline").write_bytes(b"")
    (root / MANIFEST).write_bytes(b"")
    for name in ("n" * 150, "new\nline", "../study/server.key", MANIFEST):
        with pytest.raises(ConfigError, match=r"no backup takes|cannot be put into"):
            write_archive(tmp_path / "c.tar", root, [name], {})


def test_a_file_is_copied_in_pieces(tmp_path):
    (tmp_path / "study").mkdir()
    with (tmp_path / "study" / "large").open("wb") as file:
        file.truncate(96 << 20)
    tracemalloc.start()
    write_archive(tmp_path / "b.tar", tmp_path / "study", ["large"], {})
    read_archive(tmp_path / "b.tar", tmp_path / "new")
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


# --- other archives ----------------------------------------------------------------------------------------------


def info(name, blob=b"", kind=tarfile.REGTYPE, link=""):
    found = tarfile.TarInfo(name)
    found.size, found.type, found.linkname = len(blob), kind, link
    return found


def with_more(entries):
    return [*entries, (info("zzz", b"1"), b"1")]


def with_more_inside(entries):
    return [entries[0], (info("aaa", b"1"), b"1"), *entries[1:]]


def with_less(entries):
    return [*entries[:2], *entries[3:]]


def without_the_last(entries):
    return entries[:-1]


def twice(entries):
    return [*entries, entries[-1]]


def other_order(entries):
    return [entries[0], *reversed(entries[1:])]


def other_contents(entries):
    return [*entries[:-1], (entries[-1][0], b"PUBLIC")]


def other_size(entries):
    return [*entries[:-1], (info("sites/n.pub", b"publi"), b"publi")]


def symbolic_link(entries):
    return [*entries[:-1], (info("sites/n.pub", kind=tarfile.SYMTYPE, link="/etc/passwd"), b"")]


def hard_link(entries):
    return [*entries[:-1], (info("sites/n.pub", kind=tarfile.LNKTYPE, link="server.key"), b"")]


def device(entries):
    return [*entries[:-1], (info("sites/n.pub", kind=tarfile.FIFOTYPE), b"")]


def absolute(entries):
    return [*entries[:-1], (info("/tmp/n.pub", b"public"), b"public")]


def parent(entries):
    return [*entries[:-1], (info("sites/../../n.pub", b"public"), b"public")]


def no_manifest(entries):
    return entries[1:]


def manifest_later(entries):
    return [*entries[1:], entries[0]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_more, "holds 'zzz', which its manifest does not name"),
        (with_more_inside, "holds 'aaa', which its manifest does not name"),
        (with_less, "lacks runs/a/round-000001.safetensors|lacks runs/a/empty"),
        (without_the_last, "lacks sites/n.pub"),
        (twice, "holds 'sites/n.pub', which its manifest does not name"),
        (other_order, "lacks|does not name there"),
        (other_contents, "holds sites/n.pub with other contents"),
        (other_size, "holds sites/n.pub with 5 bytes; its manifest says 6"),
        (symbolic_link, "holds 'sites/n.pub', which is a link"),
        (hard_link, "holds 'sites/n.pub', which is a link"),
        (device, "holds 'sites/n.pub', which is a link or no plain file"),
        (absolute, "no path inside"),
        (parent, "no path inside"),
        (no_manifest, "does not begin with a manifest"),
        (manifest_later, "does not begin with a manifest"),
    ],
)
def test_an_archive_that_is_not_what_its_manifest_says_is_refused_by_name(made, tmp_path, change, said):
    with pytest.raises(Damaged, match=said) as error:
        read_archive(packed(tmp_path / "c.tar", change(members(made))), tmp_path / "new")
    assert "nothing was put in place" in error.value.hint
    assert not (tmp_path / "n.pub").exists()


@pytest.mark.parametrize(
    "files",
    [
        [{"path": "../x", "size": 0, "sha256": "0" * 64, "mode": 0o600}],
        [{"path": "/x", "size": 0, "sha256": "0" * 64, "mode": 0o600}],
        [{"path": "x", "size": -1, "sha256": "0" * 64, "mode": 0o600}],
        [{"path": "x", "size": 1 << 33, "sha256": "0" * 64, "mode": 0o600}],
        [{"path": "x", "size": 0, "sha256": "0" * 64, "mode": 0o4755}],
        [{"path": "x", "size": 0, "sha256": "0", "mode": 0o600}],
        [{"path": p, "size": 0, "sha256": "0" * 64, "mode": 0o600} for p in ("b", "a")],
        [{"path": p, "size": 0, "sha256": "0" * 64, "mode": 0o600} for p in ("a", "a")],
        [{"path": p, "size": 0, "sha256": "0" * 64, "mode": 0o600} for p in ("a", "a/b")],
        [{"path": MANIFEST, "size": 0, "sha256": "0" * 64, "mode": 0o600}],
        [{"path": "x"}],
        "x",
        None,
    ],
)
def test_a_manifest_that_no_backup_has_is_refused_before_anything_is_written(tmp_path, files):
    blob = dump_record("backup", {"files": files})
    with pytest.raises(Damaged, match="no backup has"):
        read_archive(packed(tmp_path / "c.tar", [(info(MANIFEST, blob), blob)]), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_size_that_is_only_announced_costs_nothing(tmp_path):
    """A manifest, a member and an extended head that say they have gigabytes: refused from their first 512 bytes."""
    for name, kind in (
        (MANIFEST, tarfile.REGTYPE),
        ("PaxHeaders/x", tarfile.XHDTYPE),
        ("././@LongLink", tarfile.GNUTYPE_LONGNAME),
    ):
        head = info(name, kind=kind)
        head.size = (1 << 33) - 1
        (tmp_path / "c.tar").write_bytes(head.tobuf(tarfile.USTAR_FORMAT))
        os.truncate(tmp_path / "c.tar", 1 << 33)
        tracemalloc.start()
        with pytest.raises(Damaged):
            read_archive(tmp_path / "c.tar", tmp_path / "new")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    large = {"path": "x", "size": (1 << 33) - 1, "sha256": "0" * 64, "mode": 0o600}
    blob = dump_record("backup", {"files": [{**large, "path": f"x{n:04}"} for n in range(5000)]})  # 40 TB
    with pytest.raises(ResourceError, match="no space"):
        read_archive(packed(tmp_path / "d.tar", [(info(MANIFEST, blob), blob)]), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    place = tmp_path_factory.mktemp("small")
    (place / "study").mkdir()
    (place / "study" / "server.key").write_bytes(b"secret")
    write_archive(place / "b.tar", place / "study", ["server.key"], {"made": 1})
    return place, (place / "b.tar").read_bytes()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_archive_that_is_cut_or_has_a_flipped_bit_gives_the_same_files_or_an_error(small, data):
    place, blob = small
    at = data.draw(st.integers(0, len(blob) - 1))
    cut = data.draw(st.booleans())
    (place / "c.tar").write_bytes(
        blob[:at] if cut else blob[:at] + bytes([blob[at] ^ 1 << data.draw(st.integers(0, 7))]) + blob[at + 1 :]
    )
    new = place / f"new-{len(list(place.iterdir()))}"
    try:
        read_archive(place / "c.tar", new)
    except Damaged:
        return
    assert there(new) == {"server.key": b"secret"}
    assert not cut or at >= len(blob) - 512  # of the two empty blocks at its end

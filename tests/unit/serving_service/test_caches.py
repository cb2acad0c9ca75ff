"""What goes from a cache that is full, what never does, and what is taken for whole."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servicekit.storage import StorageError
from serving_service import caches
from serving_service.caches import DamagedError, Entry, FolderCache, size_of, to_drop

ENTRIES = st.lists(
    st.builds(
        lambda name, used_at, files: (name, used_at, files),
        st.sampled_from("abcdefgh"),
        st.integers(0, 5),
        st.dictionaries(st.tuples(st.just(1), st.integers(0, 6)), st.integers(0, 100)),
    ),
    unique_by=lambda each: each[0],
).map(lambda found: _entries({name: (used_at, files) for name, used_at, files in found}))


def _entries(content: Mapping[str, tuple[int, Mapping[tuple[int, int], int]]]) -> list[Entry]:
    # A file has one size, in whichever folder it is.
    sizes: dict[tuple[int, int], int] = {}
    for _, files in content.values():
        for file, size in files.items():
            sizes.setdefault(file, size)
    return [
        Entry(name=name, used_at=used_at, files={file: sizes[file] for file in files})
        for name, (used_at, files) in content.items()
    ]


@given(entries=ENTRIES, bound=st.integers(0, 400), in_use=st.sets(st.sampled_from("abcdefgh")))
def test_the_rest_fits_or_is_in_use_and_the_oldest_go_first(entries: list[Entry], bound: int, in_use: set[str]) -> None:
    dropped = to_drop(entries, bound=bound, in_use=in_use)
    left = [entry for entry in entries if entry not in dropped]
    assert not {entry.name for entry in dropped} & in_use
    assert size_of(left) <= bound or {entry.name for entry in left} <= in_use
    if dropped:  # without the last of them it would not have fitted
        assert size_of([*left, dropped[-1]]) > bound
    unused = sorted((entry.used_at, entry.name) for entry in entries if entry.name not in in_use)
    assert [(entry.used_at, entry.name) for entry in dropped] == unused[: len(dropped)]


def test_files_that_two_folders_share_are_free_when_both_are_gone() -> None:
    shared = {(1, 1): 100}
    first, second = Entry(name="a", used_at=1, files=shared), Entry(name="b", used_at=2, files={**shared, (1, 2): 1})
    assert size_of([first, second]) == 101
    assert to_drop([first, second], bound=100, in_use=()) == [first, second]


class Cache:
    """A cache with folders of one file of 8 KiB, and what is said to be in use."""

    def __init__(self, directory: Path, *, bound: int) -> None:
        self.used: set[str] = set()
        self.fails: Exception | None = None
        self.when_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.cache = FolderCache(directory, content="c", bound=bound, used=self._used)

    async def _used(self) -> set[str]:
        self.when_asked.set()
        await self.may_answer.wait()
        if self.fails is not None:
            raise self.fails
        return self.used

    def make(self, name: str, *, used_at: int) -> Path:
        with caches.unfinished(self.cache.directory) as folder:
            (folder / "entry" / "c").mkdir(parents=True)
            (folder / "entry" / "c" / "file").write_bytes(bytes(8_192))
            caches.seal(folder / "entry" / "c")
            self.cache.keep(folder / "entry", name)
        os.utime(self.cache.path(name), (used_at, used_at))
        return self.cache.path(name)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.cache.directory.iterdir())


async def test_least_recently_used_goes_and_what_is_used_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", bound=40_000)
    cache.used = {str(cache.make("a", used_at=1))}
    for number, name in enumerate("bcd"):
        cache.make(name, used_at=number + 2)
    await cache.cache.tidy()
    assert cache.names() == ["a", "d"]


async def test_what_is_marked_as_used_at_the_last_moment_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", bound=0)
    late = cache.make("late", used_at=1)
    cache.make("never", used_at=2)
    cache.may_answer.clear()
    tidying = asyncio.create_task(cache.cache.tidy())
    await cache.when_asked.wait()
    assert caches.mark_used(late)
    cache.may_answer.set()
    await tidying
    assert cache.names() == ["late"]


async def test_what_was_dropped_cannot_be_marked_as_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", bound=0)
    path = cache.make("a", used_at=1)
    await cache.cache.tidy()
    assert not caches.mark_used(path)


async def test_a_cache_is_tidied_another_time_when_it_is_not_known_what_is_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", bound=0)
    cache.make("a", used_at=1)
    cache.fails = StorageError("disk I/O error")
    await cache.cache.tidy()
    assert cache.names() == ["a"]
    cache.fails = None
    await cache.cache.tidy()
    assert cache.names() == []


async def test_others_go_on_while_folders_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache", bound=0)
    cache.make("a", used_at=1)
    others_went_on = threading.Event()
    removed = shutil.rmtree

    def slowly(*arguments: Any, **options: Any) -> None:
        assert others_went_on.wait(10), "the event loop waits for the removal"
        removed(*arguments, **options)

    async def others() -> None:
        others_went_on.set()

    monkeypatch.setattr("serving_service.caches.shutil.rmtree", slowly)
    async with asyncio.TaskGroup() as group:
        dropping = group.create_task(cache.cache.dropped("a"))
        group.create_task(others())
    await dropping
    others_went_on.clear()
    async with cache.cache.unfinished():
        going_on = asyncio.create_task(others())
    await going_on
    assert cache.names() == []


async def test_a_cache_that_is_not_there_yet_is_tidy(tmp_path: Path) -> None:
    await Cache(tmp_path / "nowhere", bound=0).cache.tidy()
    assert not (tmp_path / "nowhere").exists()


async def test_what_was_not_finished_is_removed_by_the_next_process_and_by_no_other(tmp_path: Path) -> None:
    with caches.unfinished(tmp_path) as folder:
        os.rename(folder, tmp_path / ".unfinished-left")  # noqa: PTH104
    cache = Cache(tmp_path, bound=0).cache
    async with cache.unfinished() as own:
        cache.clear_leftovers()
        assert [path.name for path in tmp_path.iterdir()] == [own.name]
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_who_make_the_same_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", bound=0)
    first = cache.make("a", used_at=1).stat().st_ino
    assert cache.make("a", used_at=2).stat().st_ino == first
    assert cache.names() == ["a"]


def a_sealed_folder(directory: Path) -> Path:
    content = directory / "content"
    (content / "deep").mkdir(parents=True)
    (content / "MLmodel").write_text("flavors")
    (content / "deep" / "weights").write_bytes(bytes(range(256)))
    caches.seal(content)
    return content


@pytest.mark.parametrize("digests", [True, False])
def test_what_was_sealed_is_whole_and_what_came_later_is_removed(tmp_path: Path, digests: bool) -> None:
    """It would be imported: what was compiled in place of its source, a module in place of another of that name."""
    content = a_sealed_folder(tmp_path)
    (content / "deep" / "__pycache__").mkdir()
    (content / "deep" / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"code")
    (content / "json.py").write_text("code")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept.py").write_text("code")
    (content / "numpy").symlink_to(tmp_path / "elsewhere")
    caches.check(content, digests=digests)
    assert sorted(path.name for path in content.rglob("*") if not path.is_dir()) == ["MLmodel", "weights"]
    assert not (content / "numpy").is_symlink()
    assert (tmp_path / "elsewhere" / "kept.py").exists()


def test_a_link_is_not_taken_for_the_file_that_it_leads_to(tmp_path: Path) -> None:
    content = a_sealed_folder(tmp_path)
    (content / "MLmodel").rename(tmp_path / "moved")
    (content / "MLmodel").symlink_to(tmp_path / "moved")
    with pytest.raises(DamagedError, match="'MLmodel' is not there any more"):
        caches.check(content, digests=True)


@pytest.mark.parametrize("digests", [True, False])
def test_what_is_shorter_or_gone_or_was_never_sealed_is_damaged(tmp_path: Path, digests: bool) -> None:
    content = a_sealed_folder(tmp_path)
    os.truncate(content / "deep" / "weights", 255)
    with pytest.raises(DamagedError, match="'deep/weights' is not what it was"):
        caches.check(content, digests=digests)
    (content / "deep" / "weights").unlink()
    with pytest.raises(DamagedError, match="not there any more"):
        caches.check(content, digests=digests)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DamagedError, match="cannot be read"):
        caches.check(content, digests=digests)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DamagedError, match="no manifest"):
        caches.check(content, digests=digests)


def test_digests_tell_a_changed_byte(tmp_path: Path) -> None:
    content = a_sealed_folder(tmp_path)
    (content / "deep" / "weights").write_bytes(bytes(256))
    caches.check(content, digests=False)
    with pytest.raises(DamagedError, match="'deep/weights'"):
        caches.check(content, digests=True)


def test_links_and_pipes_are_not_sealed(tmp_path: Path) -> None:
    content = a_sealed_folder(tmp_path)
    (content / "key").symlink_to("/etc/hostname")
    with pytest.raises(DamagedError, match="'key' is neither a file nor a folder"):
        caches.seal(content)

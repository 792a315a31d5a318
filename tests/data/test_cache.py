"""The cache of files: whole or absent, one download for all, never more on disk than it must."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from diptych.configs.errors import UserError
from diptych.data import cache as cache_module
from diptych.data.cache import FileCache

SIZE = 20480


def writes(size: int = SIZE, calls: list[str] | None = None, pause: float = 0.0) -> Callable[[Path], None]:
    def bring(path: Path) -> None:
        if calls is not None:
            calls.append(path.name)
        time.sleep(pause)
        path.write_bytes(os.urandom(size))

    return bring


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def use(cache: FileCache, name: str, bring: Callable[[Path], None] | None = None) -> None:
    os.close(cache.open(name, SIZE, bring or writes()))


def age(cache: FileCache, name: str, seconds: float) -> None:
    """As if last used so long ago; the time of the first use stays."""
    stat = (cache.folder / name).stat()
    then = time.time_ns() - int(seconds * 1e9)
    os.utime(cache.folder / name, ns=(min(stat.st_atime_ns, then), then))


def test_a_file_is_brought_once_and_appears_whole(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 10 * SIZE)
    calls: list[str] = []

    def bring(path: Path) -> None:
        assert not cache.has("a")
        writes(calls=calls)(path)
        assert names(cache.folder) == {path.name, "a.lock"}

    for _ in range(3):
        handle = cache.open("a", SIZE, bring)
        assert os.fstat(handle).st_size == SIZE
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(handle, b"x")
        os.close(handle)
    assert len(calls) == 1
    assert names(cache.folder) == {"a"}


def test_a_download_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10 * SIZE)

    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise UserError("no")

    for call in (cache.open, cache.bring_ahead):
        with pytest.raises(UserError, match="no"):
            call("a", SIZE, fails)
        assert names(tmp_path) == set()
    use(cache, "a")


def test_a_file_that_the_disk_cut_is_brought_again(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10 * SIZE)
    use(cache, "a")
    os.truncate(tmp_path / "a", 7)
    use(cache, "a")
    assert (tmp_path / "a").stat().st_size == SIZE


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 3 * SIZE)
    for seconds, name in ((50, "a"), (40, "b"), (30, "c")):
        use(cache, name)
        age(cache, name, seconds)
    use(cache, "a")  # in use again
    use(cache, "d")
    assert names(tmp_path) == {"a", "c", "d"}
    handle = cache.open("c", SIZE, writes())
    age(cache, "c", 100)
    cache.touch(handle)
    os.close(handle)
    age(cache, "a", 70)
    use(cache, "e")
    assert names(tmp_path) == {"c", "d", "e"}


def test_an_open_file_survives_its_eviction(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, SIZE)
    handle = cache.open("a", SIZE, lambda path: path.write_bytes(b"a" * SIZE) and None)
    use(cache, "b")
    assert names(tmp_path) == {"b"}
    assert os.pread(handle, SIZE, 0) == b"a" * SIZE
    os.close(handle)


def test_what_was_brought_ahead_is_not_evicted_for_what_may_come_later(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 3 * SIZE)
    use(cache, "old")
    age(cache, "old", 1000)
    assert all(cache.bring_ahead(name, SIZE, writes()) for name in "abc")
    assert names(tmp_path) == {"a", "b", "c"}
    assert cache.bring_ahead("a", SIZE, writes())
    assert not cache.bring_ahead("d", SIZE, writes())
    use(cache, "a")
    assert not cache.bring_ahead("d", SIZE, writes())  # it is in use
    age(cache, "a", 1000)
    assert cache.bring_ahead("d", SIZE, writes())
    assert names(tmp_path) == {"b", "c", "d"}
    use(cache, "now")  # a file that is needed comes; what was to be used last goes
    assert names(tmp_path) == {"b", "c", "now"}
    age(cache, "b", 4000)  # nobody came for it
    assert cache.bring_ahead("e", SIZE, writes())
    assert names(tmp_path) == {"c", "now", "e"}


def test_what_is_hinted_at_again_is_kept(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 2 * SIZE)
    for seconds, name in ((200, "a"), (100, "b")):
        use(cache, name)
        age(cache, name, seconds)
    assert cache.bring_ahead("a", SIZE, writes())
    assert cache.bring_ahead("c", SIZE, writes())
    assert names(tmp_path) == {"a", "c"}


def test_room_for_what_is_brought_ahead_is_made_in_the_order_of_use(tmp_path: Path) -> None:
    order = ["d", "a", "f", "c", "e", "b"]
    cache = FileCache(tmp_path, len(order) * SIZE)
    for seconds, name in enumerate(reversed(order), 100):
        use(cache, name)
        age(cache, name, seconds)
    for number, evicted in enumerate(order):
        assert cache.bring_ahead(f"new{number}", SIZE, writes())
        assert evicted not in names(tmp_path)
        assert set(order[number + 1 :]) < names(tmp_path)


def test_a_file_larger_than_the_cache_is_read_all_the_same(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 100)
    assert not cache.bring_ahead("a", SIZE, writes())
    use(cache, "a")
    use(cache, "b")
    assert names(tmp_path) == {"b"}


def test_a_cache_that_is_too_small_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    message = "data.cache_gb: 2.05e-05 is less than what is read at a time"
    cache = FileCache(tmp_path, SIZE)
    for name in "abc":
        use(cache, name)
        assert message not in caplog.text
        age(cache, name, 100)
    for name in "abcabc":  # what was evicted is needed again
        use(cache, name)
        age(cache, name, 100)
    assert caplog.text.count(message) == 1
    caplog.clear()
    other = FileCache(tmp_path, SIZE)
    for name in "def":  # what is in use is evicted
        use(other, name)
    assert caplog.text.count(message) == 1


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"the cache's folder .*file/cache cannot be made: .*; set data.cache"
    ):
        FileCache(tmp_path / "file" / "cache", 1)


def open_in_process(folder: Path, name: str, log: Path, pause: float) -> None:
    def bring(path: Path) -> None:
        with log.open("a") as file:
            file.write(f"{name}\n")
        writes(pause=pause)(path)

    handle = FileCache(folder, 100 * SIZE).open(name, SIZE, bring)
    assert len(os.pread(handle, 2 * SIZE, 0)) == SIZE
    os.close(handle)


def test_of_many_processes_and_threads_one_downloads(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache", tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=open_in_process, args=(folder, name, log, 0.2))
        for name in "abab"
        for _ in range(3)
    ]
    threads = [threading.Thread(target=open_in_process, args=(folder, "a", log, 0.2)) for _ in range(3)]
    for worker in processes + threads:
        worker.start()
    for worker in processes + threads:
        worker.join()
    assert [process.exitcode for process in processes] == [0] * 12
    assert sorted(log.read_text().split()) == ["a", "b"]
    assert names(folder) == {"a", "b"}


def download_slowly(folder: Path, begun: Event) -> None:
    def bring(path: Path) -> None:
        path.write_bytes(b"half")
        begun.set()
        time.sleep(60)

    FileCache(folder, 100 * SIZE).open("a", SIZE, bring)


def killed_downloader(folder: Path, meanwhile: Callable[[], Any] = lambda: None) -> None:
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=download_slowly, args=(folder, begun))
    process.start()
    assert begun.wait(20)
    meanwhile()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_downloader_that_is_killed_holds_up_nobody(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 100 * SIZE)
    done: list[bool] = []
    waiting = threading.Thread(target=lambda: done.append(use(cache, "a") is None))

    def meanwhile() -> None:
        waiting.start()
        assert cache.bring_ahead("a", SIZE, writes())  # somebody does already
        time.sleep(0.1)
        assert not done

    killed_downloader(tmp_path, meanwhile)
    waiting.join(20)
    assert done == [True]
    assert names(tmp_path) == {"a"}  # the leftover of the dead is gone


def test_leftovers_of_the_dead_go_with_the_next_download_of_any_file(tmp_path: Path) -> None:
    killed_downloader(tmp_path)
    assert any(name.endswith(".tmp") for name in names(tmp_path))
    use(FileCache(tmp_path, 100 * SIZE), "b")
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    assert "b" in names(tmp_path)


def test_a_download_under_way_counts_and_is_left_alone(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 2 * SIZE)
    use(cache, "b")
    age(cache, "b", 1000)

    def meanwhile() -> None:
        assert names(tmp_path) >= {"b"}
        use(cache, "c")
        assert "b" not in names(tmp_path)  # b and c, and the whole of a that is coming, would be three
        assert [name for name in names(tmp_path) if name.endswith(".tmp")]

    killed_downloader(tmp_path, meanwhile)


def test_a_child_that_is_forked_during_a_download_does_not_keep_its_lock(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 100 * SIZE)
    children: list[int] = []
    read, write = os.pipe()

    def bring(path: Path) -> None:
        child = os.fork()
        if child == 0:
            os.read(read, 1)  # lives on until told otherwise
            os._exit(0)
        children.append(child)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.open("a", SIZE, bring)
    use(cache, "a")
    os.write(write, b"x")
    os.waitpid(children[0], 0)
    os.close(read)
    os.close(write)
    assert not cache_module._held

"""The processes of a node that read one remote set: forks, a shared cache, shards brought ahead."""

import copy
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diptych.data import remote
from diptych.data.shards import ShardSet, open_shards

from .object_store import BUCKET, Fault, Proxy

N = 22
URL = f"s3://{BUCKET}/set"


def all_of(shards: ShardSet) -> list[Any]:
    return [shards.read(sample_id) for sample_id in range(len(shards))]


def read_all(shards: ShardSet, seed: int) -> list[Any]:
    ids = random.Random(seed).sample(range(N), N)
    return sorted(shards.read_many(ids), key=lambda raw: raw.sample_id)


def test_processes_forked_spawned_and_copied_read_the_same(proxy: Proxy, folder: Path) -> None:
    here, there = open_shards(folder), open_shards(URL, cache_gb=0)
    expected = all_of(here)
    assert there.read(1) == expected[1]  # the connection of the parent
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(there.read, range(N))) == expected
    assert there.read(2) == expected[2]
    assert pickle.loads(pickle.dumps(there)).read(3) == expected[3]
    assert copy.copy(there).read(3) == expected[3]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(there.read, range(N))) == expected


def test_processes_that_share_a_cache_download_each_file_once(proxy: Proxy, folder: Path) -> None:
    proxy.pause = 0.05
    shards = open_shards(URL)
    with ProcessPoolExecutor(5, mp_context=multiprocessing.get_context("fork")) as pool:
        for got in pool.map(read_all, [shards] * 5, range(5)):
            assert got == all_of(open_shards(folder))
    assert (len(proxy.gets("idx")), len(proxy.gets("tar"))) == (6, 6)


def test_processes_read_on_from_a_cache_that_holds_less_than_they_use(
    proxy: Proxy, folder: Path, tmp_path: Path
) -> None:
    tar = (folder / "00000.tar").stat().st_blocks * 512
    limit = int(2.5 * tar)  # of six shards
    cache = tmp_path / "small"
    shards = open_shards(URL, cache_gb=limit / 1e9, cache=cache)
    sizes: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            sizes.append(on_disk(cache))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
            for seeds in (range(4), range(4, 8)):
                for got in pool.map(read_all, [shards] * 4, seeds):
                    assert got == all_of(open_shards(folder))
    finally:
        done.set()
        thread.join()
    # the second time at most two of six shards are there, however the processes met the first time
    assert len(proxy.gets("tar")) >= 6 + 4
    # four processes each bring a file that they need at once, whatever is in use
    assert max(sizes) <= limit + 4 * tar
    assert on_disk(cache) <= limit
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def on_disk(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def test_prefetch_brings_shards_in_their_order_and_returns_at_once(proxy: Proxy, folder: Path) -> None:
    shards = open_shards(URL)
    proxy.pause = 1
    start = time.monotonic()
    shards.prefetch([5, 1, 3])
    assert time.monotonic() - start < 1
    proxy.pause = 0
    wait_until(lambda: len(proxy.gets("tar")) == 3)
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "prefetch"])
    asked = [line.split()[1] for line in proxy.gets("tar")]
    assert {path.rpartition("/")[2] for path in asked} == {"00005.tar", "00001.tar", "00003.tar"}
    before = len(proxy.log)
    assert shards.read(5) == open_shards(folder).read(5)
    assert shards.read(21) == open_shards(folder).read(21)
    assert len(proxy.log) == before
    open_shards(folder).prefetch([1, 2])  # of a local folder there is nothing to bring
    open_shards(URL, cache_gb=0).prefetch([1, 2])


def test_prefetch_waits_for_room_rather_than_evict_what_nobody_has_read_yet(
    proxy: Proxy, folder: Path, tmp_path: Path
) -> None:
    one = sum((folder / f"00000.{end}").stat().st_blocks * 512 for end in ("tar", "idx"))
    shards = open_shards(URL, cache_gb=3.4 * one / 1e9, cache=tmp_path / "small")
    shards.prefetch([4, 3, 2, 1, 0])
    wait_until(lambda: len(proxy.gets("tar")) == 3)
    time.sleep(0.3)
    assert len(proxy.gets("tar")) == 3
    fetched = {line.split()[1].rpartition("/")[2] for line in proxy.gets("tar")}
    assert fetched == {"00004.tar", "00003.tar", "00002.tar"}
    shards.prefetch([])  # ends the waiting
    assert shards.read(0).sample_id == 0  # what is needed now comes in any case
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "prefetch"])


def wait_until(holds: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_failing_prefetch_is_left_to_the_reader(proxy: Proxy) -> None:
    shards = open_shards(URL)
    proxy.faults = [Fault("500", "tar", times=3)]
    shards.prefetch([0])
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "prefetch"])
    assert not proxy.faults[0].times
    assert shards.read(0).sample_id == 0


def test_shutting_down_leaves_no_thread_that_hangs(proxy: Proxy) -> None:
    assert remote._made or open_shards(URL)
    code = f"from diptych.data.shards import open_shards; s = open_shards('{URL}', cache_gb=0); s.read(0)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ),
    )
    assert (done.returncode, done.stderr) == (0, "")

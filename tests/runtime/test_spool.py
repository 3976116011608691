"""The event spool under what happens to jobs: threads, forks, SIGKILL, a full disk, a deleted file."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openweights_prefect.runtime.spool import MAX_EVENT_BYTES, SpoolReader, append
from openweights_prefect.types.canonical import decode_event

ROOT = Path(__file__).parents[2]

# Threads and forks that log as fast as they can; after each `append` the writer notes what it logged, so
# that every noted event is one whose `append` returned. Sizes cross pages: a kill in a `write` tears it.
STORM = """
import os, sys, threading
from openweights_prefect.runtime.spool import append
spool, notes, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
def write(who):
    note = os.open(f"{notes}/{who}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for n in range(rounds):
        append(spool, {"who": who, "n": n, "pad": "x" * (37 * n % 9000)})
        os.write(note, b"%d\\n" % n)
append(spool, {"who": "parent", "n": 0})
for child in range(3):
    if os.fork() == 0:
        os.setpgid(0, 0)
        print(os.getpid(), flush=True)
        threads = [threading.Thread(target=write, args=(f"{os.getpid()}-{t}",)) for t in range(3)]
        [t.start() for t in threads]; [t.join() for t in threads]
        os._exit(0)
print("forked", flush=True)
"""


def read_all(spool: Path, **options: int) -> list[dict[str, Any]]:
    reader = SpoolReader(spool, **options)
    events: list[dict[str, Any]] = []
    position = -1
    while (batch := reader.read()).end > position:
        position = batch.end
        events += batch.events
    return [decode_event(event["data"]) for event in events]


def start_storm(spool: Path, notes: Path, rounds: int) -> list[int]:
    command = [sys.executable, "-c", STORM, str(spool), str(notes), str(rounds)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)})
    assert parent.stdout is not None
    pids = []
    for line in parent.stdout:
        if line.strip() != "forked":
            pids.append(int(line))
        if len(pids) == 3:
            break
    parent.wait()
    return pids


def noted(notes: Path) -> dict[str, int]:
    """How many appends returned, by writer."""
    return {path.name: len(path.read_text().splitlines()) for path in notes.iterdir()}


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()  # nobody reaps an orphan in some containers


def await_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def check_storm(events: list[dict[str, Any]], notes: Path) -> None:
    """Each writer's events once, in order, none that was noted missing, nothing else."""
    by_writer: dict[str, list[int]] = {}
    for event in events:
        assert "unreadable_event" not in event, event
        by_writer.setdefault(event["who"], []).append(event["n"])
        assert len(event.get("pad", "")) == 37 * event["n"] % 9000
    for writer, count in noted(notes).items():
        assert by_writer[writer][:count] == list(range(count)), writer
        assert len(by_writer[writer]) <= count + 1  # written, and killed before the note


@pytest.mark.parametrize("seed", range(3))
def test_what_append_returned_from_survives_sigkill(tmp_path: Path, seed: int) -> None:
    """Forks with threads, killed at random times while others go on: no event is lost, torn or doubled."""
    spool, notes = tmp_path / "events.jsonl", tmp_path / "notes"
    notes.mkdir()
    pids = [pid for _ in range(2) for pid in start_storm(spool, notes, 400)]
    chance = random.Random(seed)
    for pid in pids[:4]:
        time.sleep(chance.uniform(0, 0.05))
        os.killpg(pid, signal.SIGKILL)
    await_end(pids)
    check_storm(read_all(spool, max_bytes=50_000), notes)


def test_every_value_comes_back(tmp_path: Path) -> None:
    """Also those that strict JSON lacks, and a user's own key of the encoding."""
    spool = tmp_path / "events.jsonl"
    logged = {"a": math.inf, "b": [-math.inf, {"$float": "NaN"}], "c": "é😀\n", "d": None, "e": 1e-300}
    append(spool, logged, file="event:file-1")
    append(spool, {"nan": math.nan})
    first, second = read_all(spool)
    assert first == logged
    assert math.isnan(second["nan"])


@pytest.mark.parametrize(
    "line",
    [
        b"no json at all",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'"text"',
        b'{"data": {}}',
        b'{"at": "soon", "data": {}}',
        b'{"at": 1, "data": {"x": NaN, "y": 1e999, "z": "\\u0000 \\ud800"}, "file": "\\u0000"}',
        b'{"at": 1e300, "data": {"ok": 1}}',
        b'{"at": NaN, "data": {"ok": 1}, "file": 7}',
        b'{"at": 1, "data": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
        b'{"at": 1, "data": ' + b'{"a":' * 400 + b"1" + b"}" * 400 + b"}",
        b'{"at": 1, "data": {"n": ' + b"9" * 5000 + b"}}",
    ],
)
def test_a_job_may_write_anything_into_its_spool(tmp_path: Path, line: bytes) -> None:
    """What is not an event of ours can be stored all the same, and harms no other."""
    spool = tmp_path / "events.jsonl"
    append(spool, {"before": 1})
    with spool.open("ab") as stream:
        stream.write(line)  # without a line feed
    append(spool, {"after": 1})
    batch = SpoolReader(spool).read()
    kept = [event for event in batch.events if event["data"] not in ({"before": 1}, {"after": 1})]
    assert len(batch.events) - len(kept) == 2
    text = json.dumps(kept, allow_nan=False)
    assert "\\u0000" not in text
    assert "\\ud800" not in text
    assert all(0 <= event["at"] < 1e12 for event in kept)


def test_a_torn_record_is_no_event(tmp_path: Path) -> None:
    """Its `append` never returned; the one after it is whole."""
    spool = tmp_path / "events.jsonl"
    append(spool, {"n": 1})
    whole = spool.read_bytes()
    spool.write_bytes(whole + whole[: len(whole) // 2])
    assert read_all(spool) == [{"n": 1}]
    append(spool, {"n": 2})
    assert read_all(spool) == [{"n": 1}, {"n": 2}]


def test_a_huge_event_keeps_its_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Memory stays bounded on the way to the ledger, also for a line without an end."""
    spool = tmp_path / "events.jsonl"
    append(spool, {"text": "x" * (MAX_EVENT_BYTES + 1)})
    with spool.open("ab") as stream:
        stream.write(b"y" * (3 * MAX_EVENT_BYTES))
    append(spool, {"n": 1})
    events = read_all(spool)
    assert events[0]["bytes"] > MAX_EVENT_BYTES
    assert events[-1] == {"n": 1}
    assert len(json.dumps(events)) < 20_000
    assert "Log it as a file" in capfd.readouterr().err


def test_a_deleted_spool_is_read_to_its_end_then_the_new_one(tmp_path: Path) -> None:
    """Neither the events before the deletion nor those after it are lost."""
    spool = tmp_path / "events.jsonl"
    append(spool, {"n": 0})
    append(spool, {"n": 1})
    reader = SpoolReader(spool, max_events=1)
    numbers = [event["data"]["n"] for event in reader.read().events]
    spool.unlink()
    append(spool, {"n": 2})
    while reader.end() > (batch := reader.read()).end or batch.events:
        numbers += [event["data"]["n"] for event in batch.events]
    assert numbers == [0, 1, 2]


def test_an_emptied_spool_goes_on(tmp_path: Path) -> None:
    spool = tmp_path / "events.jsonl"
    append(spool, {"text": "x" * 1000})
    reader = SpoolReader(spool)
    before = reader.read().end
    os.truncate(spool, 0)
    append(spool, {"n": 2})
    batch = reader.read()
    assert [event["data"] for event in batch.events] == [{"n": 2}]
    assert batch.end > before


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = Path(tempfile.mkdtemp(prefix="ow-test-disk-"))
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if made.returncode:
        folder.rmdir()
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


FULL_DISK = """
import os, sys
from openweights_prefect.runtime.spool import append, settle
spool, filler = sys.argv[1], sys.argv[2]
for n in range(60):
    append(spool, {"n": n, "pad": "x" * 500})
if os.fork() == 0:  # The child has none of the parent's events, and logs its own.
    append(spool, {"n": -1})
    os._exit(0 if not settle() else 1)
_, status = os.wait()
assert status == 0, status
assert not settle()
os.unlink(filler)
append(spool, {"n": 60})
append(spool, {"n": 61})
"""


def test_a_full_disk_loses_nothing_and_ends_nothing(small_disk: Path, tmp_path: Path) -> None:
    """Events wait in memory until there is room; stderr says so once, and no two lines are glued together."""
    spool, filler = small_disk / "events.jsonl", small_disk / "filler"
    filler.write_bytes(b"x" * 40_000)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, spool, filler],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert [event["n"] for event in read_all(spool)] == list(range(62))
    assert done.stderr.count("kept in memory") == 2  # once in the parent, once in the child
    assert "lost" not in done.stderr


def test_what_never_fits_is_counted(small_disk: Path) -> None:
    """At the end of the process stderr has the number; the exit code stays what it was."""
    spool = small_disk / "events.jsonl"
    (small_disk / "filler").write_bytes(b"x" * 60_000)
    script = (
        "import sys\nfrom openweights_prefect.runtime.spool import append\n"
        "for n in range(50): append(sys.argv[1], {'n': n, 'pad': 'x' * 1000})\nsys.exit(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, spool],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 3
    kept = read_all(spool)
    assert [event["n"] for event in kept] == list(range(len(kept)))
    assert f"{50 - len(kept)} events were lost" in done.stderr


def test_a_folder_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    """Errors other than a full disk are borne alike."""
    script = "import sys\nfrom openweights_prefect.runtime.spool import append\nappend(sys.argv[1], {'n': 1})"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "missing" / "events.jsonl")],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert "cannot be written" in done.stderr

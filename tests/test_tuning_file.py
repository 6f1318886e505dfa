"""The file of tuned answers: what is damaged counts as absent, and writers lose nothing."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_fused import _tuning_file
from resnet_fused._tuning_file import Answer, merge, read

HOME = "~/.cache/resnet_fused/tuning-1.json"
HERE = "A CPU, avx512, threads: 2"
ONE = {"a convolution": Answer(1, "direct", {"direct": 0.25, "torch": 0.5, "winograd5": None})}
TWO = {"another": Answer(8, "torch", {"direct": 2.0, "torch": 1.0})}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tuning.json"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """For hypothesis, whose examples share a file."""
    return tmp_path_factory.mktemp("scratch") / "tuning.json"


# ---- where ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "want"),
    [
        ({"RESNET_FUSED_TUNE_FILE": "/some/where.json"}, "/some/where.json"),
        ({"RESNET_FUSED_TUNE_FILE": "here.json", "XDG_CACHE_HOME": "/cache"}, "here.json"),
        ({"RESNET_FUSED_TUNE_FILE": "none", "XDG_CACHE_HOME": "/cache"}, None),
        ({"RESNET_FUSED_TUNE_FILE": "0"}, None),
        ({"XDG_CACHE_HOME": "/cache"}, "/cache/resnet_fused/tuning-1.json"),
        ({"RESNET_FUSED_TUNE_FILE": "", "XDG_CACHE_HOME": ""}, HOME),
        ({"XDG_CACHE_HOME": "not/absolute"}, HOME),
    ],
)
def test_location(environ, want):
    assert _tuning_file.path(environ) == (want and Path(want).expanduser())


def test_no_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert _tuning_file.path({}) is None


def test_the_tests_have_none():
    assert _tuning_file.path() is None


# ---- reading -------------------------------------------------------------------------------------


def test_what_is_written_is_read(path):
    assert merge(path, HERE, ONE) == {HERE: ONE}
    assert read(path) == _tuning_file.Contents({HERE: ONE})


def test_absent_is_no_problem(path):
    assert read(path) == _tuning_file.Contents()
    assert read(path / "below" / "nothing") == _tuning_file.Contents()


def document(**changes):
    entry = {"batch": 1, "plan": "direct", "ms": {"direct": 1.0}}
    whole = {"format": "resnet-fused tuning", "version": 1, "machines": {HERE: {"conv": entry}}}
    return json.dumps(whole | changes)


def with_entry(entry):
    return document(machines={HERE: {"conv": entry}})


DAMAGED = {
    "empty": "",
    "no JSON": "}{",
    "bytes": b"\xff\xfe\x00",
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
    "half": document()[:-20],
    "two": document() * 2,
    "zeros": b"\0" * 4096,
    "deep": "[" * 100_000,
    "a list": "[]",
    "null": "null",
    "foreign": '{"format": "something else", "version": 1, "machines": {}}',
    "older": document(version=0),
    "newer": document(version=2),
    "version of a kind": document(version="1"),
    "version that is a list": document(version=[1] * 1000),
    "no machines": '{"format": "resnet-fused tuning", "version": 1}',
    "machines in a list": document(machines=[]),
    "machine without answers": document(machines={HERE: None}),
    "machine with a list": document(machines={HERE: [1]}),
    "entry that is null": with_entry(None),
    "entry that is a number": with_entry(3),
    "entry without plan": with_entry({"batch": 1, "ms": {"direct": 1.0}}),
    "plan without time": with_entry({"batch": 1, "plan": "torch", "ms": {"direct": 1.0}}),
    "plan that was not timed": with_entry({"batch": 1, "plan": "torch", "ms": {"torch": None}}),
    "plan that is a list": with_entry({"batch": 1, "plan": [], "ms": {"torch": 1.0}}),
    "no times": with_entry({"batch": 1, "plan": "direct", "ms": {}}),
    "times in a list": with_entry({"batch": 1, "plan": "direct", "ms": [1.0]}),
}
for batch in (0, -1, 1.5, True, "1", None):
    DAMAGED[f"batch {batch!r}"] = with_entry({"batch": batch, "plan": "a", "ms": {"a": 1.0}})
for time in (0, -1.0, float("nan"), float("inf"), True, "1", 10**400, [1]):
    text = with_entry({"batch": 1, "plan": "a", "ms": {"a": 1.0, "b": time}})
    DAMAGED[f"time {str(time)[:9]}"] = text


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_counts_as_absent(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = read(path)
    assert found.machines == {}
    assert found.problem


@given(content=st.binary(max_size=300))
def test_any_bytes_count_as_absent(content, scratch):
    scratch.write_bytes(content)
    found = read(scratch)
    assert found.machines == {}
    assert found.problem


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    place=st.sampled_from(["", "machines", HERE, "conv", "batch", "plan", "ms", "direct"]),
    value=JSON,
)
def test_any_json_in_any_place_is_read_or_absent(place, value, scratch):
    content = json.loads(document())
    inner = content
    for key in ("machines", HERE, "conv", "ms", "direct"):
        if place in inner or not place:
            break
        inner = inner[key]
    if place:
        inner[place] = value
    else:
        content = value
    scratch.write_text(json.dumps(content))
    found = read(scratch)
    for answers in found.machines.values():
        for answer in answers.values():
            assert answer.batch >= 1
            assert answer.ms[answer.plan] > 0
            assert all(ms is None or 0 < ms < float("inf") for ms in answer.ms.values())
    if found.problem:
        assert not found.machines


def test_cut_anywhere_it_counts_as_absent(path):
    merge(path, HERE, ONE | TWO)
    whole = path.read_bytes().rstrip()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert read(path).machines == {}


def test_what_is_no_file(path):
    path.mkdir()
    assert read(path).problem == "is not a regular file"
    with pytest.raises(OSError, match="is not a regular file"):
        merge(path, HERE, ONE)
    assert path.is_dir()
    assert read(Path("/dev/null")).problem == "is not a regular file"
    with pytest.raises(OSError, match="is not a regular file"):
        merge(Path("/dev/null"), HERE, ONE)
    assert not Path("/dev/null.bak").exists()


def test_a_pipe_that_nobody_writes_to(path):
    os.mkfifo(path)
    assert read(path).problem == "is not a regular file"


def test_large_files_are_not_read(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    assert read(path).problem == "is larger than 16 MiB"


# ---- writing -------------------------------------------------------------------------------------


def test_answers_are_added(path):
    merge(path, HERE, ONE)
    merge(path, "another machine", ONE)
    want = {HERE: ONE | TWO, "another machine": ONE}
    assert merge(path, HERE, TWO) == want
    assert read(path).machines == want


def test_the_last_answer_counts(path):
    merge(path, HERE, ONE | TWO)
    again = {"another": Answer(2, "direct", {"direct": 1.0, "torch": 3.0})}
    assert merge(path, HERE, again) == {HERE: ONE | again}


def test_folders_are_made(tmp_path):
    path = tmp_path / "new" / "and new" / "tuning.json"
    merge(path, HERE, ONE)
    assert read(path).machines == {HERE: ONE}


@pytest.mark.parametrize("content", [b"my novel", document(version=2).encode()])
def test_what_is_not_ours_is_put_aside(path, content):
    path.write_bytes(content)
    assert merge(path, HERE, ONE) == {HERE: ONE}
    assert read(path).machines == {HERE: ONE}
    assert path.with_name("tuning.json.bak").read_bytes() == content


def test_links_stay_links(tmp_path, path):
    target = tmp_path / "target.json"
    path.symlink_to(target)
    merge(path, HERE, ONE)
    merge(path, HERE, TWO)
    assert path.is_symlink()
    assert read(target).machines == {HERE: ONE | TWO}


def test_the_umask_decides_who_may_read(path):
    before = os.umask(0o022)
    try:
        merge(path, HERE, ONE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was(path, broken, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    merge(path, HERE, ONE)
    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space left"):
        merge(path, HERE, TWO)
    monkeypatch.undo()
    assert read(path).machines == {HERE: ONE}
    assert os.listdir(path.parent) == [path.name], "no temporary file is left"


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        merge(tmp_path / "file" / "tuning.json", HERE, ONE)


WRITER = """
import sys
from pathlib import Path
from resnet_fused._tuning_file import Answer, merge
path, name = Path(sys.argv[1]), sys.argv[2]
sys.stdin.readline()  # all start at once
for i in range(25):
    merge(path, "machine", {f"{name} {i}": Answer(1, "direct", {"direct": i + 1.0})})
"""


def test_processes_that_write_at_once_lose_nothing(path):
    """And whoever reads meanwhile sees a whole file."""
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, str(i)], stdin=subprocess.PIPE)
        for i in range(4)
    ]
    merge(path, HERE, ONE)
    for writer in writers:
        writer.stdin.write(b"\n")
        writer.stdin.close()
    while any(writer.poll() is None for writer in writers):
        found = read(path)
        assert not found.problem
        assert found.machines[HERE] == ONE
    assert [writer.returncode for writer in writers] == [0] * 4
    found = read(path).machines
    assert found[HERE] == ONE
    assert found["machine"].keys() == {f"{w} {i}" for w in range(4) for i in range(25)}
    assert os.listdir(path.parent) == [path.name]

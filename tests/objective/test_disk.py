"""What a replayed step does to files, to the process and to its output is forgotten."""

import contextlib
import csv
import fcntl
import gc
import json
import os
import pathlib
import pickle
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lla_callbacks.objective.muting import no_output
from lla_callbacks.objective.stand_ins import RefusedError


def there(folder):
    """Return all that is in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        time = path.lstat().st_mtime_ns
        found[str(path.relative_to(folder))] = time if path.is_dir() else (time, path.read_bytes())
    return found


def flag():
    assert os.path.exists("flag")
    os.remove("flag")
    assert not pathlib.Path("flag").exists()
    with pytest.raises(FileNotFoundError):
        os.remove("flag")
    assert "flag" not in os.listdir()


def atomic():
    pathlib.Path("new.json").write_text(json.dumps([1]))
    os.replace("new.json", "state.json")
    assert json.loads(pathlib.Path("state.json").read_text()) == [1]
    assert not os.path.exists("new.json")


def moved():
    os.rename("flag", "other")
    assert pathlib.Path("other").read_text() == "up"
    assert sorted(os.listdir()) == ["folder", "other", "state.json"]


def folders():
    os.makedirs("a/b")
    pathlib.Path("a/b/c").write_text("x")
    assert os.path.getsize("a/b/c") == 1
    with pytest.raises(FileExistsError):
        os.mkdir("a")


def emptied():
    shutil.rmtree("folder")
    assert not os.path.isdir("folder")
    os.makedirs("folder/inner", exist_ok=True)
    shutil.copy("flag", "folder/inner/x")
    assert pathlib.Path("folder/inner/x").read_text() == "up"


def folders_moved():
    os.makedirs("new/inner")
    pathlib.Path("new/inner/x").write_text("1")
    os.mkdir("best")
    os.rename("new", "best/one")
    assert pathlib.Path("best/one/inner/x").read_text() == "1"
    assert not os.path.exists("new/inner/x")


def emptied_twice():
    os.remove("folder/inner/file")
    os.rmdir("folder/inner")
    with pytest.raises(FileNotFoundError):
        os.rmdir("folder/inner")
    with pytest.raises(OSError, match="not empty"):
        os.rmdir(".")
    os.mkdir("new")
    pathlib.Path("new/x").write_text("1")
    shutil.rmtree("new")
    assert not os.path.exists("new/x")


def temporary():
    with tempfile.TemporaryDirectory(dir=".") as name, open(f"{name}/x", "w+") as file:
        file.write("1")
    descriptor, name = tempfile.mkstemp(dir=".")
    os.write(descriptor, b"abc")
    os.close(descriptor)
    assert pathlib.Path(name).read_bytes() == b"abc"
    with tempfile.NamedTemporaryFile("w", dir=".", delete=False) as file:
        file.write("x")


def low():
    descriptor = os.open("flag", os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, b"!")
    os.close(descriptor)
    assert pathlib.Path("flag").read_text() == "up!"
    os.truncate("flag", 1)
    assert pathlib.Path("flag").read_text() == "u"
    pathlib.Path("flag").touch()
    os.utime("flag", (1, 1))
    os.chmod("flag", 0)


def linked():
    os.symlink("flag", "latest")
    assert pathlib.Path("latest").read_text() == "up"


def elsewhere():
    os.chdir("folder")
    pathlib.Path("x").write_text("1")
    assert pathlib.Path("x").exists()


def appended():
    for _ in range(2):
        with open("log.csv", "a", newline="") as file:
            csv.writer(file).writerow([1])
    assert len(pathlib.Path("log.csv").read_text().split()) == 2


def arrays():
    np.save("a.npy", np.ones(3))
    torch.save({"a": torch.ones(3)}, "a.pt")
    with open("a.pkl", "wb") as file:
        pickle.dump([1], file)
    assert np.load("a.npy").sum() == torch.load("a.pt")["a"].sum() == 3


def mapped():
    values = np.memmap("a.bin", "float32", "w+", shape=(3,))
    values[0] = 2
    values.flush()
    assert np.fromfile("a.bin", "float32")[0] == 2
    np.ones(2).tofile("b.bin")
    with open("flag", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("down")
        assert file.name == "flag"
    with open("flag") as file:
        assert file.read() == "down"
    with open("flag", "x" if not os.path.exists("flag") else "a+") as file:
        file.write("!")
        file.seek(0)
        assert file.read() == "down!"


def by_a_thread():
    def write():
        pathlib.Path("mine").write_text("x")
        print("mine")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert os.path.exists("mine")


def table():
    connection = sqlite3.connect("other.db")
    connection.execute("create table t (n int)")
    connection.close()


STEPS = [flag, atomic, moved, folders, emptied, temporary, low, linked, elsewhere, appended,
         arrays, mapped, by_a_thread, table, folders_moved, emptied_twice]  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_files_are_what_the_step_made_of_them_and_then_what_they_were(
    tmp_path, monkeypatch, capsys, step
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flag").write_text("up")
    (tmp_path / "state.json").write_text("[]")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "file").write_text("x")
    before, functions = there(tmp_path), dict(vars(os))
    with no_output():
        step()
        print("out")
        print("err", file=sys.stderr)
    found = there(tmp_path)
    # A folder in which others were made for a moment has another time.
    assert {k: v for k, v in found.items() if isinstance(v, tuple)} == {
        k: v for k, v in before.items() if isinstance(v, tuple)
    }
    assert found.keys() == before.keys()
    assert dict(vars(os)) == functions
    assert os.getcwd() == str(tmp_path)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("call", [lambda: os.system("true"), lambda: subprocess.run(["true"])])
def test_other_programs_are_refused_also_where_the_step_catches_it(call):
    def caught():
        with no_output(), contextlib.suppress(Exception):
            call()

    with pytest.raises(RefusedError, match=r"another program.*on_train_batch_end"):
        caught()


def test_a_database_is_read_and_not_written(tmp_path):
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table t (n int)")
    with no_output():
        inside = sqlite3.connect(path)
        assert inside.execute("select count(*) from t").fetchone() == (0,)
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            inside.execute("insert into t values (1)")
        inside.close()
    connection.close()


def test_compilers_write_their_files(tmp_path):
    code = "import os\nopen(p, 'w').close(); os.replace(p, q)"
    names = {"p": str(tmp_path / "a"), "q": str(tmp_path / "b"), "__name__": "triton.compiler"}
    with no_output():
        exec(code, names)
    assert os.listdir(tmp_path) == ["b"]


def test_another_thread_is_left_alone(tmp_path, capsys):
    ready, go = threading.Event(), threading.Event()

    def write():
        ready.wait()
        (tmp_path / "theirs").write_text("x")
        print("theirs")
        go.set()

    thread = threading.Thread(target=write)
    thread.start()
    with no_output():
        ready.set()
        go.wait()
    thread.join()
    assert (tmp_path / "theirs").read_text() == "x"
    assert capsys.readouterr().out == "theirs\n"


SWITCHES = {
    "cudnn": (lambda: torch.backends.cudnn.benchmark,
              lambda v: setattr(torch.backends.cudnn, "benchmark", v)),
    "deterministic": (torch.are_deterministic_algorithms_enabled,
                      torch.use_deterministic_algorithms),
    "anomalies": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "collector": (gc.isenabled, lambda v: gc.enable() if v else gc.disable()),
    "filters": (lambda: len(warnings.filters) % 2 == 0,
                lambda v: warnings.filterwarnings("ignore", message=f"{len(warnings.filters)}")),
    "path": (lambda: len(sys.path) % 2 == 0, lambda v: sys.path.append("nowhere")),
    "autocast": (lambda: torch.is_autocast_enabled("cpu"),
                 lambda v: torch.set_autocast_enabled("cpu", v)),
}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_switches_of_the_process_are_what_they_were(name):
    read, put = SWITCHES[name]
    before = read()
    with no_output():
        put(not before)
        assert read() != before
    assert read() == before


def test_figures_of_pyplot_are_those_that_were_open(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.close("all")
    mine = plt.figure()
    for step in (plt.figure, lambda: plt.close("all"), lambda: plt.savefig(tmp_path / "a.png")):
        with no_output():
            step()
        assert plt.get_fignums() == [mine.number]
        assert plt.gcf() is mine
    assert os.listdir(tmp_path) == []
    plt.close("all")


def test_who_keeps_a_stand_in_has_the_real_function_after_the_pass(tmp_path, capsys):
    with no_output():
        kept = open, torch.save, sqlite3.connect, subprocess.Popen.__init__, os.remove, sys.stdout
    opened, save, connect, begin, remove, output = kept
    with opened(tmp_path / "text", "w") as file:
        file.write("1")
    save(torch.ones(1), tmp_path / "tensor")
    with contextlib.closing(connect(tmp_path / "base")) as connection:
        connection.execute("create table t (n int)")
    program = subprocess.Popen.__new__(subprocess.Popen)
    begin(program, ["true"])
    assert program.wait() == 0
    print("heard", file=output)
    assert capsys.readouterr().out == "heard\n"
    assert sorted(os.listdir(tmp_path)) == ["base", "tensor", "text"]
    remove(tmp_path / "text")
    assert not (tmp_path / "text").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors by /proc")
def test_a_pass_leaves_no_descriptor_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state.json").write_text("[]")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with no_output():
        atomic()
        with tempfile.NamedTemporaryFile("w", dir=".") as file:
            file.write("x")
    assert len(os.listdir("/proc/self/fd")) == before


def test_all_is_put_back_where_the_working_directory_is_gone(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    functions, opened = dict(vars(os)), open
    with ThreadPoolExecutor(1) as theirs:
        theirs.submit(int).result()  # its thread is there before
        with no_output():
            os.chdir(tmp_path)
            theirs.submit(os.rmdir, home).result()
    assert dict(vars(os)) == functions
    assert open is opened


def test_what_cannot_be_put_back_leaves_no_stand_in(monkeypatch):
    def fail():
        raise OSError("no")

    monkeypatch.setattr("lla_callbacks.objective.muting.switches", lambda: fail)
    before = [open, torch.save, threading.Thread.start, sys.stdout, dict(vars(os))]
    with pytest.raises(OSError, match="no"), no_output():
        pass
    assert [open, torch.save, threading.Thread.start, sys.stdout, dict(vars(os))] == before

"""A real standalone cluster of Spark on this machine: a master and two workers, one of which is killed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import pytest

from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.jobs.kinds import Generate, Score
from tf_gpt2.jobs.records import seed_of

pyspark = pytest.importorskip("pyspark", reason="needs pyspark: pip install 'tf_gpt2[spark]'")
pytestmark = pytest.mark.skipif(not shutil.which("java"), reason="needs Java 17 or later")

ROOT = Path(__file__).parents[3]
SPARK_HOME = Path(pyspark.__file__).parent
MARK = "TF_GPT2_TEST_CLUSTER"
"""The variable by which the cluster's processes are told from others."""
N_RECORDS, N_NEW = 2000, 16
OPTIONS = {"max_new_tokens": N_NEW, "temperature": 0.8}


class Cluster:
    """A master and two workers of one core each, on loopback."""

    def __init__(self, folder):
        self.folder, self.id = folder, uuid.uuid4().hex
        self.environment = {
            **os.environ,
            MARK: self.id,
            "SPARK_HOME": str(SPARK_HOME),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_NO_DAEMONIZE": "1",
            "PYSPARK_PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        self.master = self.start("master.Master", "--host", "127.0.0.1", "--port", "0", "--webui-port", "0")
        self.url = self.find("master", "Starting Spark master at ")
        self.page = self.find("master", "MasterWebUI to 127.0.0.1, and started at ")
        size = ["--host", "127.0.0.1", "--cores", "1", "--memory", "1g", "--webui-port", "0"]
        self.workers = [self.start("worker.Worker", *size, "-d", f"{folder}/work{i}", self.url) for i in range(2)]
        self.wait(lambda: self.n_alive() == 2)

    def start(self, name, *arguments):
        command = [SPARK_HOME / "bin" / "spark-class", f"org.apache.spark.deploy.{name}", *arguments]
        with (self.folder / f"{name.partition('.')[0]}.log").open("ab") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def find(self, name, words):
        """The word behind some others in a log."""
        log = self.folder / f"{name}.log"
        self.wait(lambda: words in log.read_text())
        return log.read_text().partition(words)[2].split()[0]

    def n_alive(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.page.rpartition(':')[2]}/json/", timeout=10) as answer:
            return json.load(answer)["aliveworkers"]

    @staticmethod
    def wait(is_so, timeout=120):
        end = time.monotonic() + timeout
        while not is_so():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.1)

    def python_workers(self):
        """The processes that compute: those that a daemon of Spark has forked."""
        daemons = {pid for pid in self.processes() if b"pyspark.daemon" in read(pid, "cmdline")}
        return [pid for pid in daemons if int(read(pid, "stat").rpartition(b") ")[2].split()[1]) in daemons]

    def processes(self):
        marked = f"{MARK}={self.id}".encode()
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [pid for pid in pids if marked in read(pid, "environ").split(b"\0")]

    def stop(self):
        """Ends what is left; the processes of this test carry its mark."""
        for process in [*self.workers, self.master]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in self.processes():
            if pid != os.getpid():
                kill(pid)


def read(pid, name):
    """What /proc knows of a process; nothing of one that has ended."""
    try:
        content = Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b"0 () Z 0" if name == "stat" else b""
    return content


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture
def session(cluster, monkeypatch):
    from pyspark.sql import SparkSession

    for name in ("SPARK_LOCAL_IP", "PYSPARK_PYTHON", "SPARK_HOME"):
        monkeypatch.setenv(name, cluster.environment[name])
    builder = SparkSession.builder.master(cluster.url).config("spark.executor.memory", "512m")
    session = builder.config("spark.ui.enabled", "false").getOrCreate()
    yield session
    session.stop()


@pytest.fixture(scope="module")
def prompts():
    """Texts of one to ten words, up to 30 characters."""
    words = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split()
    return [" ".join(words[i % 500 : i % 500 + 1 + i % 10])[:30] for i in range(N_RECORDS)]


def test_a_data_frame_is_answered_as_by_a_direct_call(session, generator, prompts):
    from tf_gpt2.jobs.spark import answer

    rows = [(i, text, i % 5 + 1 if i % 2 else None) for i, text in enumerate(prompts[:60])] + [
        (60, "", None),
        (61, "x", -1),
    ]
    frame = session.createDataFrame(rows, "id INT, text STRING, top_k INT").repartition(3)
    found = {row["id"]: row for row in answer(Generate(**OPTIONS), frame, model=embedded_dir()).collect()}
    assert sorted(found) == [*range(62)]
    assert [found[i]["error"]["code"] for i in (60, 61)] == ["empty_text", "invalid_option"]
    expected = generator.complete_many(
        prompts[:60], seed=[seed_of(0, i) for i in range(60)], top_k=[row[2] or 0 for row in rows[:60]], **OPTIONS
    )
    for i, one in enumerate(expected):
        assert (found[i]["text"], found[i]["ids"], found[i]["error"]) == (one.text, one.ids, None)
    with pytest.raises(ValueError, match="'top_k' is no option of a record in score"):
        answer(Score(), frame, model=embedded_dir())
    scores = answer(Score(), frame.drop("top_k").where("id < 60").limit(5), model=embedded_dir()).collect()
    for row in scores:
        assert row["logprob"] == pytest.approx(generator.score(prompts[row["id"]]).total, abs=1e-3)


def test_killed_workers_lose_nothing_and_do_nothing_twice(cluster, generator, prompts, tmp_path):
    """Kills a Python process, and later a whole Worker with its executor, in the middle of the job."""
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(prompts)]
    lines[1234] = "no record"
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    files = ["--input", tmp_path / "prompts.jsonl", "--output", out, "--part_size", "40"]
    spark = ["--spark", cluster.url, "--spark_conf", "spark.executor.memory=512m"]
    asked = ["--model_size", "tiny", *(f"--{name}={value}" for name, value in OPTIONS.items())]
    command = [sys.executable, "-m", "tf_gpt2", "batch", "generate", *files, *spark, *asked]
    job = subprocess.Popen(
        command, env=cluster.environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )

    def n_there():
        return len([*out.glob("part-*")])

    try:
        cluster.wait(lambda: n_there() >= 3 or job.poll() is not None, 200)
        killed = cluster.python_workers()[0]
        kill(killed)
        cluster.wait(lambda: n_there() >= 12 or job.poll() is not None, 200)
        n_parts = n_there()
        os.killpg(cluster.workers[0].pid, signal.SIGKILL)
        stdout, stderr = job.communicate(timeout=200)
    finally:
        job.kill()
    assert job.returncode == 0, stderr.decode()[-3000:]
    assert n_parts < 40, "the job was nearly over before the worker was killed"
    assert cluster.n_alive() <= 2
    assert cluster.workers[0].poll() is not None
    assert f"records  {N_RECORDS} answered\nerrors   1 (1 invalid_json)\n" in stdout.decode()
    answers = [json.loads(line) for path in sorted(out.glob("part-*")) for line in path.read_text().splitlines()]
    assert [one["id"] for one in answers] == [*range(1234), "prompts.jsonl:1235", *range(1235, N_RECORDS)]
    seeds = [seed_of(0, i) for i in range(N_RECORDS)]
    for i, expected in enumerate(generator.complete_many(prompts, seed=seeds, progress=False, **OPTIONS)):
        if i != 1234:
            assert (answers[i]["text"], answers[i]["ids"]) == (expected.text, expected.ids), i
    assert not [*out.glob(".*")]

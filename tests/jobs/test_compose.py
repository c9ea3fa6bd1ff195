"""The files in examples/jobs fit the schema of Compose, and name what there is. They were not run: Docker is needed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tf_gpt2 import cli
from tf_gpt2.jobs.kinds import Generate

ROOT = Path(__file__).parents[2]
KIT = ROOT / "examples" / "jobs"


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((KIT / "compose.yaml").read_text())["services"]


def test_compose_fits_the_compose_specification():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    result = subprocess.run([*command, KIT / "compose.yaml"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_command_is_one_of_ours_and_goes_to_the_master(services):
    program, *words = [word.replace("${MODEL:-tiny}", "tiny") for word in services["job"]["command"]]
    options = cli.make_parser().parse_args(words)
    assert program == "tf-gpt2"
    assert options.make_job(options) == Generate(max_new_tokens=64)
    assert options.resume
    host, port = re.fullmatch(r"spark://(\w+):(\d+)", options.spark).groups()
    master, worker = services["master"]["command"], services["worker"]["command"]
    assert master[2:] == ["--host", host, "--port", port]
    assert worker[-1] == options.spark
    settings = dict(setting.split("=") for setting in options.spark_conf)
    assert settings["spark.task.cpus"] == settings["spark.executor.cores"] == worker[worker.index("--cores") + 1]
    assert settings["spark.driver.host"] == services["job"]["hostname"]


def test_all_processes_see_the_same_folders(services):
    assert len({str(service["volumes"]) for service in services.values()}) == 1
    (volume,) = services["job"]["volumes"]
    paths = re.findall(r"=(/\w+)", " ".join(services["job"]["command"]))
    assert set(paths) == {volume.rpartition(":")[2]}


def test_the_image_is_made_of_files_that_are_there(services):
    build = services["job"]["build"]
    assert (KIT / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).samefile(KIT / "Dockerfile")
    copied = re.findall(r"^COPY (.*) \S+$", (KIT / "Dockerfile").read_text(), re.M)
    assert all((ROOT / name).exists() for line in copied for name in line.split())

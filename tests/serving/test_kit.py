"""The files in examples/serving: each read by what reads it in earnest, or by its published schema; and they agree."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from configparser import ConfigParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from tf_gpt2.serving.prompts import MOST_POSITIONS
from tf_gpt2.serving.signatures import MOST_LOGITS

ROOT = Path(__file__).parents[2]
KIT = ROOT / "examples" / "serving"
KUBERNETES_VERSION = "1.33"
NO_CLUSTER_NEEDED = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")

SERVER_FLAGS = {
    "port",
    "rest_api_port",
    "rest_api_timeout_in_ms",
    "model_config_file",
    "model_config_file_poll_wait_seconds",
    "allow_version_labels_for_unavailable_models",
    "monitoring_config_file",
    "enable_batching",
    "batching_parameters_file",
    "tensorflow_intra_op_parallelism",
    "tensorflow_inter_op_parallelism",
    "xla_cpu_compilation_enabled",
}
"""Names the server knows, of those in use. Source: TensorFlow Serving, ``model_servers/main.cc``."""


@pytest.fixture(scope="module")
def protos():
    """Messages that tensorflow-serving-api leaves out, with the fields of the server's own files.

    Source: TensorFlow Serving, ``session_bundle_config.proto`` and ``monitoring_config.proto``.
    """
    file = descriptor_pb2.FileDescriptorProto(name="kit.proto", package="kit", syntax="proto3")
    file.dependency.append(wrappers_pb2.DESCRIPTOR.name)
    wrapped = ("TYPE_MESSAGE", ".google.protobuf.Int64Value")
    fields_of = {
        "BatchingParameters": {
            "max_batch_size": wrapped,
            "batch_timeout_micros": wrapped,
            "max_enqueued_batches": wrapped,
            "num_batch_threads": wrapped,
            "allowed_batch_sizes": ("TYPE_INT64", None),
            "pad_variable_length_inputs": ("TYPE_BOOL", None),
        },
        "PrometheusConfig": {"enable": ("TYPE_BOOL", None), "path": ("TYPE_STRING", None)},
        "MonitoringConfig": {"prometheus_config": ("TYPE_MESSAGE", ".kit.PrometheusConfig")},
    }
    for message_name, fields in fields_of.items():
        message = file.message_type.add(name=message_name)
        for number, (name, (kind, type_name)) in enumerate(fields.items(), 1):
            label = "LABEL_REPEATED" if name == "allowed_batch_sizes" else "LABEL_OPTIONAL"
            message.field.add(name=name, number=number, type=kind, label=label, type_name=type_name)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"kit.{name}")) for name in fields_of}


@pytest.fixture(scope="module")
def models():
    return text_format.Parse((KIT / "models.config").read_text(), ModelServerConfig())


@pytest.fixture(scope="module")
def batching(protos):
    return text_format.Parse((KIT / "batching.config").read_text(), protos["BatchingParameters"]())


@pytest.fixture(scope="module")
def monitoring(protos):
    return text_format.Parse((KIT / "monitoring.config").read_text(), protos["MonitoringConfig"]())


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((KIT / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def manifests():
    """Kubernetes objects by kind and name."""
    documents = yaml.safe_load_all((KIT / "kubernetes.yaml").read_text())
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


@pytest.fixture(scope="module")
def container(manifests):
    (container,) = manifests["Deployment", "gpt2"]["spec"]["template"]["spec"]["containers"]
    return container


def flags_of(arguments):
    """Gives the value of each ``--name=value``."""
    matches = [re.fullmatch(r"--(\w+)=(\S+)", argument) for argument in arguments]
    assert all(matches), arguments
    return {match[1]: match[2] for match in matches}


@pytest.fixture(scope="module")
def compose_flags(compose):
    return flags_of(compose["services"]["gpt2"]["command"])


@pytest.fixture(scope="module")
def pod_flags(container):
    return flags_of(container["args"])


def test_models_config(models):
    (model,) = models.model_config_list.config
    assert (model.name, model.base_path, model.model_platform) == ("gpt2", "/models/gpt2", "tensorflow")
    assert model.model_version_policy.latest.num_versions == 1


def test_the_canary_in_the_comment_of_models_config():
    """What the comment says to do gives a config in which every label is of a version that is loaded."""
    text = (KIT / "models.config").read_text()
    text = text.replace("    model_version_policy { latest { num_versions: 1 } }\n", "").replace("#~ ", "")
    (model,) = text_format.Parse(text, ModelServerConfig()).model_config_list.config
    assert dict(model.version_labels) == {"stable": 1, "canary": 2}
    assert set(model.version_labels.values()) <= set(model.model_version_policy.specific.versions)


def test_batching_config(batching):
    """The server refuses sizes that do not rise, or do not end with the largest batch."""
    sizes = list(batching.allowed_batch_sizes)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1  # one client alone pays for no other row
    assert sizes[-1] == batching.max_batch_size.value
    assert batching.pad_variable_length_inputs
    assert 0 < batching.batch_timeout_micros.value < 100_000
    assert batching.num_batch_threads.value >= 1
    assert batching.max_enqueued_batches.value >= batching.num_batch_threads.value


def test_the_client_sends_no_more_rows_than_a_batch_takes(batching, kit_client):
    assert batching.max_batch_size.value >= kit_client.MOST_ROWS


def test_a_misspelt_field_of_batching_is_found(protos):
    with pytest.raises(text_format.ParseError):
        text_format.Parse("max_batch_sizes { value: 8 }", protos["BatchingParameters"]())


def test_monitoring_config(monitoring, manifests):
    assert monitoring.prometheus_config.enable
    notes = manifests["Deployment", "gpt2"]["spec"]["template"]["metadata"]["annotations"]
    assert notes["prometheus.io/path"] == monitoring.prometheus_config.path


def test_compose_fits_the_compose_specification():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    result = subprocess.run([*command, KIT / "compose.yaml"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_manifests_fit_the_schemas_of_kubernetes(manifests):
    assert len(manifests) == 6
    for document in manifests.values():
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


@NO_CLUSTER_NEEDED
def test_kustomize_puts_the_settings_beside_the_manifests(manifests):
    result = subprocess.run(["kubectl", "kustomize", KIT], capture_output=True, text=True, timeout=60, check=True)
    documents = list(yaml.safe_load_all(result.stdout))
    (settings,) = (document for document in documents if document["kind"] == "ConfigMap")
    assert settings["data"] == {path.name: path.read_text() for path in KIT.glob("*.config")}
    (deployment,) = (document for document in documents if document["kind"] == "Deployment")
    volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert volumes["config"]["configMap"]["name"] == settings["metadata"]["name"]
    assert len(documents) == len(manifests) + 1


def test_kustomization_names_the_settings(manifests):
    kustomization = yaml.safe_load((KIT / "kustomization.yaml").read_text())
    (settings,) = kustomization["configMapGenerator"]
    assert sorted(settings["files"]) == sorted(path.name for path in KIT.glob("*.config"))
    assert kustomization["resources"] == ["kubernetes.yaml"]
    volumes = manifests["Deployment", "gpt2"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "config", "configMap": {"name": settings["name"]}} in volumes


def test_flags_are_the_servers(compose_flags, pod_flags):
    assert compose_flags.keys() | pod_flags.keys() == SERVER_FLAGS
    for name, value in compose_flags.items() - {("xla_cpu_compilation_enabled", "${GPT2_XLA:-false}")}:
        assert pod_flags[name] == value
    assert "# - --xla_cpu_compilation_enabled=true" in (KIT / "kubernetes.yaml").read_text()


def test_flags_name_files_that_are_mounted(compose, compose_flags, manifests, container):
    files = {value for value in compose_flags.values() if value.startswith("/")}
    assert files == {f"/config/{path.name}" for path in KIT.glob("*.config")}
    assert ".:/config:ro" in compose["services"]["gpt2"]["volumes"]
    mounts = {mount["name"]: (mount["mountPath"], mount["readOnly"]) for mount in container["volumeMounts"]}
    assert mounts == {"models": ("/models", True), "config": ("/config", True)}


def test_the_model_is_where_models_config_looks_for_it(compose, models, container):
    (model,) = models.model_config_list.config
    (volume,) = (volume for volume in compose["services"]["gpt2"]["volumes"] if volume.endswith(":/models:ro"))
    source = re.fullmatch(r"\$\{GPT2_EXPORT:-(.+)\}:/models:ro", volume)[1]
    assert (KIT / source).resolve() == ROOT / "export"  # tf-gpt2 export export/gpt2
    assert model.base_path == f"/models/{model.name}"
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] == f"/v1/models/{model.name}"


def test_ports_are_the_same_everywhere(compose, compose_flags, manifests, container):
    ports = {"grpc": int(compose_flags["port"]), "rest": int(compose_flags["rest_api_port"])}
    assert ports == {"grpc": 8500, "rest": 8501}
    assert compose["services"]["gpt2"]["ports"] == [f"127.0.0.1:{port}:{port}" for port in ports.values()]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == ports
    for name, offered in {"gpt2": {"grpc", "rest"}, "gpt2-pods": {"grpc"}}.items():
        service = manifests["Service", name]["spec"]
        assert {port["name"]: port["port"] for port in service["ports"]} == {key: ports[key] for key in offered}
        assert all(port["targetPort"] == port["name"] for port in service["ports"])
    assert manifests["Service", "gpt2-pods"]["spec"]["clusterIP"] == "None"
    probes = [container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    assert [probe.get("httpGet", probe.get("tcpSocket"))["port"] for probe in probes] == ["rest", "rest", "grpc"]
    notes = manifests["Deployment", "gpt2"]["spec"]["template"]["metadata"]["annotations"]
    assert notes["prometheus.io/port"] == str(ports["rest"])


def test_the_server_is_of_the_version_that_writes_exports(compose, container):
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    least = re.search(r"tensorflow>=([\d.]+)", setup["options"]["install_requires"])[1]
    images = {name: service["image"] for name, service in compose["services"].items()}
    assert images == {name: f"tensorflow/serving:{least}.0{'-gpu' * (name == 'gpt2-gpu')}" for name in images}
    assert images.keys() == {"gpt2", "gpt2-gpu"}
    assert container["image"] == images["gpt2"]
    assert container["command"] == compose["services"]["gpt2"]["entrypoint"] == ["tensorflow_model_server"]


def test_the_gpu_is_only_taken_when_asked_for(compose):
    gpu = compose["services"]["gpt2-gpu"]
    assert gpu["profiles"] == ["gpu"]
    assert gpu["command"] == compose["services"]["gpt2"]["command"]
    assert "profiles" not in compose["services"]["gpt2"]


def pod_of(manifests):
    return manifests["Deployment", "gpt2"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def drains(compose, container):
    """The commands that wait for the last answer before SIGTERM, of pods and of compose."""
    (hook,) = compose["services"]["gpt2"]["pre_stop"]
    in_pods = container["lifecycle"]["preStop"]["exec"]["command"]
    return {"pods": in_pods, "compose": [part.replace("$$", "$") for part in hook["command"]]}


def test_servers_end_after_their_last_request(compose, compose_flags, manifests, drains):
    """The grace period has room for all that is waited for, and for the longest request."""
    longest_s = int(compose_flags["rest_api_timeout_in_ms"]) / 1000
    grace_s = {
        "pods": pod_of(manifests)["terminationGracePeriodSeconds"],
        "compose": int(compose["services"]["gpt2"]["stop_grace_period"].removesuffix("s")),
    }
    for where, (*_, script) in drains.items():
        *first_s, turn_s = map(int, re.findall(r"sleep (\d+);", script))
        most_s = int(re.search(r"seq (\d+)", script)[1]) * turn_s
        assert longest_s <= most_s < grace_s[where] - sum(first_s)
        assert where == "compose" or first_s[0] >= 10  # until services send nothing more


def test_the_server_is_not_process_1(compose, manifests):
    """The kernel keeps SIGTERM from a process 1 without a handler, and the server has none."""
    for service in compose["services"].values():
        assert service["init"] is True
        assert service["stop_signal"] == "SIGTERM"
    assert pod_of(manifests)["shareProcessNamespace"] is True


@pytest.mark.parametrize("where", ["pods", "compose"])
def test_the_server_is_stopped_once_it_computes_nothing(where, drains):
    """The hook, with one process here for those of the container."""
    program = "import sys, time\nwhile sys.argv[1] == 'busy': pass\ntime.sleep(600)"
    for kind in ("busy", "idle"):
        process = subprocess.Popen([sys.executable, "-c", program, kind])
        time.sleep(1)  # until it has started, which takes time as well
        script = drains[where][-1].replace("[0-9]*", str(process.pid)).replace("sleep 15", "sleep 0")
        assert f"/proc/{process.pid}/stat" in script
        hook = subprocess.Popen([*drains[where][:-1], script])
        try:
            if kind == "busy":
                with pytest.raises(subprocess.TimeoutExpired):
                    hook.wait(timeout=5)
            else:
                assert hook.wait(timeout=15) == 0
        finally:
            for one in (hook, process):
                one.kill()
                one.wait()


def test_servers_may_do_nothing_but_serve(compose, manifests, container):
    for service in compose["services"].values():
        user = int(service["user"].partition(":")[0])
        assert user > 0
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    pod = pod_of(manifests)
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == user
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    expected = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert container["securityContext"] == expected


def test_only_clients_reach_the_pods_and_pods_reach_nobody(manifests, container):
    policy = manifests["NetworkPolicy", "gpt2"]["spec"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    assert policy["egress"] == []
    assert all(rule["from"] for rule in policy["ingress"])  # a rule without "from" lets all in
    named = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
    assert named == {port["name"] for port in container["ports"]}


def test_a_drain_of_nodes_is_possible(manifests):
    budget = manifests["PodDisruptionBudget", "gpt2"]["spec"]
    assert budget["maxUnavailable"] == 1
    assert "minAvailable" not in budget


@NO_CLUSTER_NEEDED
def test_the_digest_in_the_comment_of_kustomization_stands_beside_the_tag(container, tmp_path):
    text = (KIT / "kustomization.yaml").read_text()
    digest = "sha256:" + "0a" * 32
    for path in KIT.glob("*.*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(text.replace("#~ ", "").replace("digest: DIGEST", f"digest: {digest}"))
    made = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True, timeout=60, check=True)
    (deployment,) = (one for one in yaml.safe_load_all(made.stdout) if one["kind"] == "Deployment")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == f"{container['image']}@{digest}"
    assert f"imagetools inspect {container['image']} --format" in text


def test_nobody_made_a_digest_up():
    for path in KIT.glob("*.*"):
        assert "sha256:" not in path.read_text()


GIB = 2**30
MEASURED_GB = {"process": 0.5, "weights": 0.5, "transposed": 0.5, "position": 2.0 / 8192}
"""Of 124M in float32, as docs/serving.md has them; of the window of 1,024 positions a row."""


def test_memory_holds_what_is_allowed_at_once(compose, container, batching):
    """Two versions, and as many batches at once as there are threads, each the largest that the limits let pass."""
    n_batches, n_rows = batching.num_batch_threads.value, batching.max_batch_size.value
    batch_gb = n_rows * 1024 * MEASURED_GB["position"]
    logits_gb, json_gb = 3 * 4 * MOST_LOGITS / 1e9, 22 * MOST_LOGITS / 1e9
    versions_gb = 2 * (MEASURED_GB["weights"] + MEASURED_GB["transposed"])
    needed_gb = MEASURED_GB["process"] + versions_gb + n_batches * (max(batch_gb, logits_gb) + json_gb)
    resources = container["resources"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    memory_gb = int(resources["limits"]["memory"].removesuffix("Gi")) * GIB / 1e9
    assert needed_gb < memory_gb
    assert n_rows * 1024 <= MOST_POSITIONS
    for service in compose["services"].values():
        assert service["mem_limit"] == f"{resources['limits']['memory'].removesuffix('Gi')}gb"


def test_objects_of_kubernetes_find_each_other(manifests):
    deployment = manifests["Deployment", "gpt2"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    for (kind, _), document in manifests.items():
        if kind == "Service":
            assert document["spec"]["selector"] == labels
        if kind == "PodDisruptionBudget":
            assert document["spec"]["selector"]["matchLabels"] == labels
        if kind == "NetworkPolicy":
            assert document["spec"]["podSelector"]["matchLabels"] == labels
    scaler = manifests["HorizontalPodAutoscaler", "gpt2"]["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "gpt2"}
    assert "replicas" not in deployment  # or each apply would undo what the scaler did
    (metric,) = scaler["metrics"]
    assert metric["resource"]["name"] in deployment["template"]["spec"]["containers"][0]["resources"]["requests"]


def test_threads_are_as_many_as_cores_asked_for(container, pod_flags):
    assert pod_flags["tensorflow_intra_op_parallelism"] == container["resources"]["requests"]["cpu"]


@pytest.mark.parametrize(("state", "healthy"), [("AVAILABLE", True), ("LOADING", False), ("UNAVAILABLE", False)])
def test_the_health_check_looks_at_the_state(compose, status_port, state, healthy):
    assert (run_health_check(compose, status_port(state)) == 0) is healthy


def test_the_health_check_fails_where_nobody_listens(compose):
    assert run_health_check(compose, 1) != 0


def run_health_check(compose, port):
    """Runs the check as docker does, on another port."""
    kind, *command = compose["services"]["gpt2"]["healthcheck"]["test"]
    assert kind == "CMD"
    command = [part.replace("/8501", f"/{port}") for part in command]
    return subprocess.run(command, capture_output=True, timeout=10).returncode


@pytest.fixture
def status_port():
    """Opens ports that answer with a model's state."""
    servers = []

    def start(state):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = {"model_version_status": [{"version": "1", "state": state}]}
                self.send_response(200 if self.path == "/v1/models/gpt2" else 404)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *arguments):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()

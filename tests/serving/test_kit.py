"""The files in examples/serving: each read by what reads it in earnest, or by its published schema; and they agree."""

import json
import re
import shutil
import subprocess
import sys
import threading
from configparser import ConfigParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

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
    assert len(manifests) == 4
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


def test_pods_end_after_their_last_request(compose_flags, manifests, container):
    (_, wait_s) = container["lifecycle"]["preStop"]["exec"]["command"]
    longest_s = int(compose_flags["rest_api_timeout_in_ms"]) / 1000
    grace_s = manifests["Deployment", "gpt2"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s > longest_s + int(wait_s)


def test_objects_of_kubernetes_find_each_other(manifests):
    deployment = manifests["Deployment", "gpt2"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    for (kind, _), document in manifests.items():
        if kind == "Service":
            assert document["spec"]["selector"] == labels
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

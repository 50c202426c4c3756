"""examples/kubernetes/trainjob.yaml: its fields are those of its kinds, its command starts a run.

The fields are what the custom resources of Kubeflow Trainer v2 and the API of Kubernetes have by
these names, as far as such a manifest needs them: pkg/apis/trainer/v1alpha1 of kubeflow/trainer;
https://kubernetes.io/docs/reference/kubernetes-api (Job v1 batch, Pod v1 core).
"""

import os
import subprocess
from typing import Annotated, Any, Literal

import pytest
import yaml
from helpers.launching import ROOT, environment
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from torchtrain.config_manager import JobConfig
from torchtrain.errors import TRY_AGAIN
from torchtrain.tools.nodes import read_nodes

MANIFEST = ROOT / "examples" / "kubernetes" / "trainjob.yaml"
SET_BY_TRAINER = {
    "PET_NNODES": "4",
    "PET_NPROC_PER_NODE": "auto",
    "PET_NODE_RANK": "3",
    "PET_MASTER_ADDR": "llama3-8b-node-0-0.llama3-8b",
    "PET_MASTER_PORT": "29500",
}
"""What the plugin for torch gives the pod of node 3; pkg/runtime/framework/plugins/torch."""

Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantities = dict[str, int | str]


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Fields):
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)] = ""
    namespace: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Variable(Fields):
    name: str
    value: str = ""
    valueFrom: dict[str, Any] = {}


class Resources(Fields):
    limits: Quantities = {}
    requests: Quantities = {}


class RuntimeRef(Fields):
    name: str
    apiGroup: str = "trainer.kubeflow.org"
    kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"] = "ClusterTrainingRuntime"


class Trainer(Fields):
    image: str = ""
    command: list[str] = []
    args: list[str] = []
    env: list[Variable] = []
    numNodes: Count = 1
    resourcesPerNode: Resources = Resources()
    numProcPerNode: Count = 1


class TrainJobSpec(Fields):
    runtimeRef: RuntimeRef
    trainer: Trainer
    initializer: dict[str, Any] = {}
    suspend: bool = False
    managedBy: str = ""


class TrainJob(Fields):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainJob"]
    metadata: Metadata
    spec: TrainJobSpec


class ExitCodes(Fields):
    containerName: str = ""
    operator: Literal["In", "NotIn"]
    values: Annotated[list[int], Field(min_length=1, max_length=255)]


class PodCondition(Fields):
    type: str
    status: Literal["True", "False", "Unknown"] = "True"


class Rule(Fields):
    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onExitCodes: ExitCodes | None = None
    onPodConditions: list[PodCondition] = []


class PodFailurePolicy(Fields):
    rules: Annotated[list[Rule], Field(min_length=1, max_length=20)]


class Mount(Fields):
    name: str
    mountPath: str
    subPath: str = ""
    readOnly: bool = False


class Claim(Fields):
    claimName: str
    readOnly: bool = False


class EmptyDirectory(Fields):
    medium: Literal["", "Memory"] = ""
    sizeLimit: int | str = ""


class Volume(Fields):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDirectory | None = None
    configMap: dict[str, Any] | None = None
    secret: dict[str, Any] | None = None


class Container(Fields):
    name: Name
    image: str = ""
    command: list[str] = []
    args: list[str] = []
    workingDir: str = ""
    env: list[Variable] = []
    resources: Resources = Resources()
    volumeMounts: list[Mount] = []
    securityContext: dict[str, Any] = {}


class PodSpec(Fields):
    containers: Annotated[list[Container], Field(min_length=1)]
    initContainers: list[Container] = []
    volumes: list[Volume] = []
    restartPolicy: Literal["Never", "OnFailure"]
    terminationGracePeriodSeconds: Count = 30
    nodeSelector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    serviceAccountName: str = ""
    priorityClassName: str = ""
    securityContext: dict[str, Any] = {}
    hostNetwork: bool = False


class PodTemplate(Fields):
    metadata: Metadata = Metadata()
    spec: PodSpec


class JobSpec(Fields):
    template: PodTemplate
    parallelism: Count = 1
    completions: Count = 1
    completionMode: Literal["Indexed", "NonIndexed"] = "NonIndexed"
    backoffLimit: Count = 6
    podFailurePolicy: PodFailurePolicy
    podReplacementPolicy: Literal["TerminatingOrFailed", "Failed"] = "Failed"
    activeDeadlineSeconds: Count = 0
    ttlSecondsAfterFinished: Count = 0


class JobTemplate(Fields):
    metadata: Metadata
    spec: JobSpec


class ReplicatedJob(Fields):
    name: Name
    groupName: str = ""
    replicas: Count = 1
    template: JobTemplate


class JobSetSpec(Fields):
    replicatedJobs: list[ReplicatedJob]
    failurePolicy: dict[str, Any] = {}
    successPolicy: dict[str, Any] = {}
    network: dict[str, Any] = {}


class JobSetTemplate(Fields):
    metadata: Metadata = Metadata()
    spec: JobSetSpec


class Torch(Fields):
    numProcPerNode: int | Literal["auto", "cpu", "gpu"] = "auto"


class Policy(Fields):
    numNodes: Count = 1
    torch: Torch


class TrainingRuntimeSpec(Fields):
    mlPolicy: Policy
    podGroupPolicy: dict[str, Any] = {}
    template: JobSetTemplate


class TrainingRuntime(Fields):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainingRuntime"]
    metadata: Metadata
    spec: TrainingRuntimeSpec


@pytest.fixture(scope="module")
def documents():
    return list(yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def runtime(documents):
    return TrainingRuntime.model_validate(documents[0])


@pytest.fixture(scope="module")
def job(documents):
    return TrainJob.model_validate(documents[1])


def test_the_parts_of_the_manifest_name_each_other(runtime, job):
    assert job.spec.runtimeRef.kind == runtime.kind
    assert job.spec.runtimeRef.name == runtime.metadata.name
    (nodes,) = runtime.spec.template.spec.replicatedJobs
    step = nodes.template.metadata.labels["trainer.kubeflow.org/trainjob-ancestor-step"]
    assert (nodes.name, step) == ("node", "trainer"), "Trainer looks for these names"
    pod = nodes.template.spec.template.spec
    (container,) = pod.containers
    assert container.name == "node"
    assert {mount.name for mount in container.volumeMounts} == {one.name for one in pod.volumes}
    mounts = {mount.mountPath for mount in container.volumeMounts}
    (folder,) = [one.partition("=")[2] for one in job.spec.trainer.args if "dump_folder" in one]
    assert any(folder.startswith(f"{mount}/") for mount in mounts)


def test_which_ends_are_final(runtime):
    (nodes,) = runtime.spec.template.spec.replicatedJobs
    pod = nodes.template.spec.template.spec
    assert pod.restartPolicy == "Never", "a policy for failures needs that"
    by_status = {}
    for rule in nodes.template.spec.podFailurePolicy.rules:
        assert (rule.onExitCodes is None) != (not rule.onPodConditions), "one of the two"
        if rule.onExitCodes is not None:
            assert rule.onExitCodes.containerName == "node"
            assert rule.onExitCodes.operator == "In"
            assert rule.onExitCodes.values == sorted(set(rule.onExitCodes.values))
            by_status |= dict.fromkeys(rule.onExitCodes.values, rule.action)
    assert by_status == {2: "FailJob", TRY_AGAIN: "Ignore", 143: "Ignore"}


def test_the_command_starts_a_launcher_that_the_others_wait_for(job, tmp_path):
    script = tmp_path / "torchtrain"
    script.write_text('#!/bin/sh\nenv > told\nprintf "%s\\n" "$@"\n')
    script.chmod(0o755)
    trainer = job.spec.trainer
    assert not {variable.name for variable in trainer.env} & SET_BY_TRAINER.keys(), "reserved"
    given = {variable.name: variable.value for variable in trainer.env}
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    printed = subprocess.check_output(
        [*trainer.command, *trainer.args],
        cwd=tmp_path,
        env=environment(1) | SET_BY_TRAINER | given | path,
        text=True,
        timeout=60,
    )
    arguments = printed.splitlines()
    assert arguments == trainer.args
    told = dict(line.split("=", 1) for line in (tmp_path / "told").read_text().splitlines())
    nodes = read_nodes(told)
    assert (nodes.least, nodes.count, nodes.rank) == (trainer.numNodes, trainer.numNodes, 3)
    assert nodes.endpoint == "llama3-8b-node-0-0.llama3-8b:29500"
    ranks = trainer.numNodes * int(trainer.resourcesPerNode.limits["nvidia.com/gpu"])
    config = JobConfig().parse_args(arguments, ranks)
    assert config.checkpoint.enable
    assert config.training.global_batch_size > 0
    assert int(told["MAX_RESTARTS"]) > 0


def test_a_misspelled_field_or_a_number_for_a_text_is_seen(documents):
    for change in ({"numnodes": 4}, {"env": [{"name": "MAX_RESTARTS", "value": 10}]}):
        trainer = documents[1]["spec"]["trainer"] | change
        spec = documents[1]["spec"] | {"trainer": trainer}
        with pytest.raises(ValidationError):
            TrainJob.model_validate(documents[1] | {"spec": spec})

"""A JobSet manifest for TPU slices or GPU nodes of a Kubernetes cluster: `kubectl create -f` runs it.

One replicated job; a replica per slice (GPU nodes: one), a pod per host, a process per pod. A pod's exit code decides: 42
and signals restart the whole JobSet, `restarts` times at most; any other fails it at once. The manifest carries no TPU_* or
MEGASCALE_* variables, which GKE sets in every pod with TPUs; on GPUs the first pod's name in the JobSet's own DNS is the
coordinator. What the cluster needs beforehand is in docs/launching.md.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from launch import jobset_rules, slices, yaml
from launch.forward import SCRIPT
from launch.job import Job, LaunchError, called

CONTAINER = "train"
PORT = 6002  # of the coordinator on GPU nodes; free on GKE's hosts

FLAGS = {
    "--accelerator": "accelerator",
    "--slices": "slices",
    "--image": "image",
    "--namespace": "namespace",
    "--queue": "queue",
    "--priority": "priority",
    "--service-account": "service_account",
    "--secret": "secret",
    "--spot": "spot",
    "--reservation": "reservation",
    "--context": "context",
}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A cluster, its nodes, and what a pod gets.

    accelerator: v5e:16x16 for a TPU slice, h100:2x8 for two hosts of eight GPUs. slices: of that shape, joined over the data
    centre's network. image: what `docker push` stored, with tcjax and bash in it. namespace: of the cluster. queue: a Kueue
    LocalQueue; empty without Kueue. priority: a PriorityClass of the cluster. service_account: which may read and write the
    buckets. secret: a Secret whose keys become environment variables, as WANDB_API_KEY. spot: nodes that can be taken away.
    reservation: the name of a reservation the nodes come from. node_selector: further labels the nodes must have. volumes:
    {path in the pod: "gs://bucket", "pvc:claim" or "nfs://server/path"}. memory, cpu: what a pod asks for; empty for
    whatever the node has. shm: size of /dev/shm, as 16Gi; empty for half the node's memory. restart_strategy: Recreate, or
    BlockingRecreate, which waits until every old pod is gone. ttl: seconds a finished JobSet stays to be looked at.
    context: of kubectl; empty for the current one.
    """

    accelerator: str
    slices: int = 1
    image: str
    namespace: str = "default"
    queue: str = ""
    priority: str = ""
    service_account: str = ""
    secret: str = ""
    spot: bool = False
    reservation: str = ""
    node_selector: dict[str, str] = field(default_factory=dict)
    volumes: dict[str, str] = field(default_factory=dict)
    memory: str = ""
    cpu: str = ""
    shm: str = ""
    restart_strategy: str = "Recreate"
    ttl: int = 86_400
    context: str = ""

    def __post_init__(self) -> None:
        if self.slices < 1:
            raise LaunchError(f"slices {self.slices}: takes a whole number from 1 up.")
        if self.slices > 1 and isinstance(slices.parse(self.accelerator), slices.Gpus):
            raise LaunchError(
                f"slices {self.slices} of {self.accelerator}: slices are TPUs'; write more hosts, as in h100:4x8."
            )
        if self.ttl < 0:
            raise LaunchError(f"ttl {self.ttl}: takes seconds from 0 up.")
        if not self.image or any(letter.isspace() for letter in self.image):
            raise LaunchError(f"image {self.image!r}: takes the name of a container image, as in ghcr.io/you/tcjax:1.")


def text(job: Job, profile: Profile) -> str:
    """The manifest, one document per run of a study."""
    return yaml.documents(manifests(job, profile))


def submit(job: Job, profile: Profile) -> int:
    """Create it by kubectl; a JobSet of that name must not exist."""
    context = ["--context", profile.context] if profile.context else []
    return called(["kubectl", *context, "create", "-f", "-"], stdin=text(job, profile), where="where kubectl is set up")


def manifests(job: Job, profile: Profile) -> list[dict]:
    """Every run's manifest, checked by the rules."""
    words = [(f"{job.name}-r{run}", (*job.command, "--run", str(run))) for run in range(1, job.runs + 1)]
    jobs = [dataclasses.replace(job, name=name, command=command, runs=0) for name, command in words] or [job]
    made = [_manifest(each, profile) for each in jobs]
    for each in made:
        jobset_rules.check(each, job.save_seconds)
    return made


def _manifest(job: Job, profile: Profile) -> dict[str, Any]:
    target, name = slices.parse(profile.accelerator), job.name.lower()
    on_tpu = isinstance(target, slices.Slice)
    metadata: dict[str, Any] = {"name": name, "namespace": profile.namespace}
    if profile.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": profile.queue}
    if on_tpu:  # one child Job per node pool, which is one slice
        metadata["annotations"] = {jobset_rules.EXCLUSIVE: jobset_rules.NODEPOOL}
    replicated = "slice" if on_tpu else "node"
    failed = {"name": "ours", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    spec = {
        "ttlSecondsAfterFinished": profile.ttl,
        "failurePolicy": {
            "maxRestarts": job.restarts,
            "restartStrategy": profile.restart_strategy,
            "rules": [failed],
        },
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "replicatedJobs": [
            {
                "name": replicated,
                "replicas": profile.slices,
                "template": {
                    "spec": {
                        "parallelism": target.hosts,
                        "completions": target.hosts,
                        "completionMode": "Indexed",
                        "backoffLimit": 0,
                        "podFailurePolicy": jobset_rules.failure_policy(CONTAINER),
                        "template": _pod(job, profile, target, f"{name}-{replicated}-0-0.{name}:{PORT}"),
                    }
                },
            }
        ],
    }
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def _pod(job: Job, profile: Profile, target: slices.Slice | slices.Gpus, coordinator: str) -> dict[str, Any]:
    """One host: its labels, its volumes, and the container."""
    mounts, volumes = _volumes(profile)
    resource, labels = "nvidia.com/gpu", {}
    if isinstance(target, slices.Slice):
        resource = "google.com/tpu"
        labels = {jobset_rules.ACCELERATOR: target.facts.selector, jobset_rules.TOPOLOGY: target.topology}
    else:
        labels = {jobset_rules.GPU: target.selector}
    tolerations = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if profile.spot:
        labels["cloud.google.com/gke-spot"] = "true"
        spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        tolerations.append(spot)
    if profile.reservation:
        labels["cloud.google.com/reservation-name"] = profile.reservation
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": job.grace,
        "nodeSelector": labels | profile.node_selector,
        "tolerations": tolerations,
    }
    if profile.service_account:
        spec["serviceAccountName"] = profile.service_account
    if profile.priority:
        spec["priorityClassName"] = profile.priority
    spec["containers"] = [_container(job, profile, target, resource, coordinator) | {"volumeMounts": mounts}]
    spec["volumes"] = volumes
    if any(source.startswith("gs://") for source in profile.volumes.values()):
        return {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": spec}
    return {"spec": spec}


def _container(job: Job, profile: Profile, target: Any, resource: str, coordinator: str) -> dict[str, Any]:
    on_tpu = isinstance(target, slices.Slice)
    env: dict[str, Any] = {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "tpu,cpu" if on_tpu else "cuda,cpu"}
    if not on_tpu and target.hosts > 1:
        index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
        env |= {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": str(target.hosts), "JAX_PROCESS_ID": index}
    env |= {name: _literal(value) for name, value in job.env.items()}
    variables = [{"name": name, "valueFrom" if isinstance(it, dict) else "value": it} for name, it in env.items()]
    count = target.chips_per_host if on_tpu else target.per_host
    asked = {name: value for name, value in (("cpu", profile.cpu), ("memory", profile.memory)) if value}
    made: dict[str, Any] = {
        "name": CONTAINER,
        "image": profile.image,
        "command": ["bash", "-c", SCRIPT, "bash"],
        "args": [_literal(word) for word in job.command],
        "env": variables,
    }
    if profile.secret:
        made["envFrom"] = [{"secretRef": {"name": profile.secret}}]
    made["resources"] = {"limits": {resource: count}} | ({"requests": asked} if asked else {})
    if on_tpu:
        made["securityContext"] = {"privileged": True}
    return made


def _literal(text: str) -> str:
    """Kubernetes replaces $(NAME) by a variable and $$ by $ in commands and variables: what a word says, doubled."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def _volumes(profile: Profile) -> tuple[list[dict], list[dict]]:
    """/dev/shm in memory, and every asked volume at its path."""
    shm = {"medium": "Memory"} | ({"sizeLimit": profile.shm} if profile.shm else {})
    mounts, volumes = [{"name": "shm", "mountPath": "/dev/shm"}], [{"name": "shm", "emptyDir": shm}]
    for place, (path, source) in enumerate(profile.volumes.items()):
        if not PurePosixPath(path).is_absolute():
            raise LaunchError(f"volume {path!r}: is mounted at an absolute path in the pod, as in /tcjax/runs.")
        mounts.append({"name": f"volume-{place}", "mountPath": path})
        volumes.append({"name": f"volume-{place}"} | _source(path, source))
    return mounts, volumes


def _source(path: str, source: str) -> dict[str, Any]:
    kind, _, rest = source.replace("://", ":", 1).partition(":")
    if kind == "gs" and rest and "/" not in rest:
        # A pod on the host's network shows its own service account only when asked to.
        facts = {"bucketName": rest, "mountOptions": "implicit-dirs", "hostNetworkPodKSA": "true"}
        return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": facts}}
    if kind == "pvc" and rest:
        return {"persistentVolumeClaim": {"claimName": rest}}
    server, slash, folder = rest.partition("/")
    if kind == "nfs" and server and slash:
        return {"nfs": {"server": server, "path": f"/{folder}"}}
    raise LaunchError(f"volume {path} = {source!r}: takes gs://BUCKET, pvc:CLAIM or nfs://SERVER/PATH.")

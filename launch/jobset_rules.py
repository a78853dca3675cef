"""What a JobSet must be beyond its schema: rules read off the manifest itself, so that a hand-edited one is caught too.

The schema knows fields and types. It does not know that sixteen chips on four hosts make a 4x4, that a mesh wants all of
them, that a pod which may not save before it is killed loses its steps, or which exit code brings a training back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from launch import mesh, slices
from launch.forward import RESTART_CODES, SCRIPT
from launch.job import LaunchError

ACCELERATOR, TOPOLOGY, GPU = (
    f"cloud.google.com/gke-{name}" for name in ("tpu-accelerator", "tpu-topology", "accelerator")
)
EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
NODEPOOL = "cloud.google.com/gke-nodepool"
CHIPS = {"google.com/tpu": "chips", "nvidia.com/gpu": "GPUs"}
STRATEGIES = ("Recreate", "BlockingRecreate", "InPlaceRestart")
LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
LONGEST = 63  # of a name that is also a host name; the webhook refuses longer ones
POD_SUFFIX = "-abcde"  # Kubernetes appends five letters of its own to a pod's name


def check(manifest: dict, save_seconds: int) -> None:
    """Refuse a manifest with all that is wrong with it."""
    if said := list(faults(manifest, save_seconds)):
        raise LaunchError("; ".join(said) + ".")


def faults(manifest: dict, save_seconds: int) -> Iterator[str]:
    """One sentence per broken rule."""
    spec = manifest["spec"]
    if len(spec["replicatedJobs"]) != 1:
        yield f"{len(spec['replicatedJobs'])} replicated jobs: a training is one, with a replica per slice"
        return
    replicated = spec["replicatedJobs"][0]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    yield from _names(manifest["metadata"]["name"], replicated, job)
    yield from _devices(manifest, replicated["replicas"], job, pod)
    yield from _endings(spec, job, pod, save_seconds)


def longest_name(replicated: str, replicas: int, hosts: int) -> int:
    """How many characters a JobSet's own name may have: its pods are name-replicated-slice-host-abcde."""
    return LONGEST - len(f"-{replicated}-{replicas - 1}-{hosts - 1}{POD_SUFFIX}")


def _names(name: str, replicated: dict, job: dict) -> Iterator[str]:
    if not LABEL.fullmatch(name):
        yield f"name {name!r}: Kubernetes takes small letters, digits and '-', a letter first; give another --name"
    most = longest_name(replicated["name"], replicated["replicas"], job["completions"])
    if len(name) > most:
        yield (
            f"name {name!r} has {len(name)} characters, and pods named after it would exceed {LONGEST}: "
            f"give a --name of at most {most}"
        )


# Devices -------------------------------------------------------------------------------------------------------------


def _devices(manifest: dict, replicas: int, job: dict, pod: dict) -> Iterator[str]:
    """Selector, topology, hosts, chips and mesh say the same."""
    labels, train = pod.get("nodeSelector", {}), pod["containers"][0]
    limits = train["resources"]["limits"]
    counted = [(name, limits[name]) for name in CHIPS if name in limits]
    if len(counted) != 1:
        yield f"limits {limits} must name one of {', '.join(CHIPS)}"
        return
    (resource, per_host), hosts = counted[0], job["parallelism"]
    if job["completions"] != hosts:
        yield f"completions {job['completions']} is not parallelism {hosts}: every host runs one process"
    if not any(each.get("key") == resource for each in pod.get("tolerations", [])):
        yield f"no toleration of {resource}: its nodes are tainted, and no pod would be placed"
    per_device = 1
    if resource == "google.com/tpu":
        target = _slice(labels)
        if isinstance(target, str):
            yield target
            return
        per_device = target.facts.devices
        if (hosts, per_host) != (target.hosts, target.chips_per_host):
            yield (
                f"{hosts} hosts of {per_host} chips are {hosts * per_host}, but {target.generation}:{target.topology} is "
                f"{target.chips} chips on {target.hosts} hosts of {target.chips_per_host}"
            )
        exclusive = manifest["metadata"].get("annotations", {}).get(EXCLUSIVE)
        if exclusive != NODEPOOL:
            yield f"annotation {EXCLUSIVE} is {exclusive!r}, not {NODEPOOL}: slices would share node pools"
    elif replicas != 1:
        yield f"{replicas} replicas of GPU nodes: slices are a matter of TPUs; write more hosts, as in h100:{hosts}x8"
    elif hosts > 1:
        yield from _coordinator(manifest, hosts, train)
    if resource == "nvidia.com/gpu" and labels.get(GPU) not in (known := [each[0] for each in slices.GPUS.values()]):
        yield f"{GPU} is {labels.get(GPU)!r}; known: {', '.join(known)}"
    yield from mesh.faults(train.get("args", ()), replicas * hosts * per_host * per_device, replicas)


def _slice(labels: dict) -> slices.Slice | str:
    known = {each.selector: name for name, each in slices.GENERATIONS.items()}
    generation = known.get(labels.get(ACCELERATOR, ""))
    if generation is None:
        return f"{ACCELERATOR} is {labels.get(ACCELERATOR)!r}; known: {', '.join(known)}"
    try:
        return slices.tpu(generation, labels.get(TOPOLOGY, ""))
    except LaunchError as error:
        return f"{ACCELERATOR} {labels[ACCELERATOR]} and {TOPOLOGY} do not fit: {str(error).rstrip('.')}"


def _coordinator(manifest: dict, hosts: int, train: dict) -> Iterator[str]:
    env = {each["name"]: each.get("value", each.get("valueFrom")) for each in train.get("env", [])}
    name, rjob = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"][0]["name"]
    first = f"{name}-{rjob}-0-0.{name}:"
    if not str(env.get("JAX_COORDINATOR_ADDRESS", "")).startswith(first):
        yield f"JAX_COORDINATOR_ADDRESS is {env.get('JAX_COORDINATOR_ADDRESS')!r}, not the first pod's, {first}PORT"
    if env.get("JAX_NUM_PROCESSES") != str(hosts):
        yield f"JAX_NUM_PROCESSES is {env.get('JAX_NUM_PROCESSES')!r}, not the {hosts} hosts"
    if not isinstance(env.get("JAX_PROCESS_ID"), dict):
        yield "JAX_PROCESS_ID does not come from the pod's completion index: every pod would be the same process"


# Endings -------------------------------------------------------------------------------------------------------------


def _endings(spec: dict, job: dict, pod: dict, save_seconds: int) -> Iterator[str]:
    """A warned pod may save; its exit code reaches the JobSet, which restarts on some and fails on the others."""
    train, policy = pod["containers"][0], spec.get("failurePolicy", {})
    grace = pod.get("terminationGracePeriodSeconds", 30)
    if grace < save_seconds:
        yield f"terminationGracePeriodSeconds {grace} is shorter than the {save_seconds} seconds of a save; raise --grace"
    if train.get("command") != ["bash", "-c", SCRIPT, "bash"]:
        yield "the command is not run by the shell of launch/forward.py: SIGTERM or its exit code would be lost"
    if pod.get("restartPolicy") != "Never":
        yield f"restartPolicy {pod.get('restartPolicy')!r}: exit codes are read with Never alone"
    if job.get("backoffLimit") != 0:
        yield f"backoffLimit {job.get('backoffLimit')!r}: with 0 the whole JobSet restarts; otherwise one host alone would"
    if job.get("podFailurePolicy") != failure_policy(train["name"]):
        yield f"podFailurePolicy must fail the job on every exit code but 42 and {RESTART_CODES[1]}-255 (130 too)"
    if not any(
        rule.get("action") == "FailJobSet" and rule.get("onJobFailureReasons") == ["PodFailurePolicy"]
        for rule in policy.get("rules", [])
    ):
        yield "failurePolicy has no rule FailJobSet on PodFailurePolicy: an error of ours would restart forever"
    if policy.get("maxRestarts", 0) < 0:
        yield f"maxRestarts {policy['maxRestarts']} is negative"
    if (strategy := policy.get("restartStrategy", "Recreate")) not in STRATEGIES[:2]:
        other = "; InPlaceRestart needs another policy than ours" if strategy in STRATEGIES else ""
        yield f"restartStrategy {strategy!r}: choose of {', '.join(STRATEGIES[:2])}{other}"
    if pod.get("hostNetwork") and pod.get("dnsPolicy") != "ClusterFirstWithHostNet":
        yield f"dnsPolicy {pod.get('dnsPolicy')!r} on the host's network: pods would not find each other by name"


def failure_policy(container: str) -> dict[str, Any]:
    """Kubernetes' spelling of launch/job.py's exit codes: whatever is not in the list fails the job at once."""
    codes = {"containerName": container, "operator": "NotIn", "values": list(RESTART_CODES)}
    return {"rules": [{"action": "FailJob", "onExitCodes": codes}]}

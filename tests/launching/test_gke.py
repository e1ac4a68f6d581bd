"""The JobSet and the objects of its queue: structure, restarts, and the published schemas."""

import functools
import itertools
import os
import pathlib
import shlex

import pytest
import yaml

from qi2_jax.launching import environment, folders, gke, topology
from qi2_jax.sharding import MeshShape
from tests.launching import jobs
from tests.optional_packages import require_packages

CLUSTER = gke.Cluster(with_queue=True, name="cluster", project="project", zone="us-east5-b")
SCHEMAS = "QI2_CRD_SCHEMAS"  # folder with the definitions of JobSet and Kueue, as their repositories publish them
KUBERNETES = "1.33"
VARIANTS = {
    "four slices": jobs.TPU,
    "one host": jobs.tpu(hardware=topology.parse_slice("v6e:2x2"), slices=1, mesh=MeshShape(1, 4, 1)),
    "spot, two folders": jobs.tpu(spot=True, cache=folders.parse("--cache", "gs://bucket/samples")),
    "nfs": jobs.tpu(work=folders.parse("--work", "nfs://10.0.0.2/share")),
}


def objects(job, cluster=CLUSTER):
    return list(yaml.safe_load_all(gke.submission(job, cluster).text))


def job_of_slice(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["replicas"], replicated["template"]["spec"]


@pytest.mark.parametrize("job", VARIANTS.values(), ids=VARIANTS)
def test_slices_hosts_and_chips_make_the_mesh(job):
    *_, jobset = objects(job)
    slices, spec = job_of_slice(jobset)
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["parallelism"] == spec["completions"] == job.hardware.hosts
    assert slices * spec["completions"] * int(container["resources"]["limits"]["google.com/tpu"]) == job.mesh.size
    queue = objects(job)[1]
    (flavor,) = queue["spec"]["resourceGroups"][0]["flavors"]
    assert flavor["resources"][0]["nominalQuota"] == job.mesh.size


def test_a_preemption_restarts_all_hosts_and_does_not_count():
    *_, jobset = objects(jobs.TPU)
    _, spec = job_of_slice(jobset)
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == jobs.TPU.restarts and spec["backoffLimit"] == 0
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    exits, conditions = spec["podFailurePolicy"]["rules"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert exits["onExitCodes"]["values"] == [int(variables["QI2_STOPPED_STATUS"])]
    assert exits["onExitCodes"]["containerName"] == container["name"]
    assert conditions["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 300


def test_pods_go_to_whole_slices_of_the_right_kind():
    *_, jobset = objects(VARIANTS["spot, two folders"])
    pod = job_of_slice(jobset)[1]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
    }
    assert any(each["key"] == "cloud.google.com/gke-spot" for each in pod["tolerations"])
    assert "gke-nodepool" in jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert "cloud.google.com/gke-spot" not in str(objects(jobs.TPU))


def test_folders_are_mounted_where_the_command_looks():
    *_, jobset = objects(VARIANTS["spot, two folders"])
    template = job_of_slice(jobset)[1]["template"]
    pod = template["spec"]
    (container,) = pod["containers"]
    mounts = {each["name"]: each for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert f"{mounts['cache']['mountPath']}/samples/s1" in container["command"] and mounts["cache"]["readOnly"]
    assert f"{mounts['work']['mountPath']}/runs/s1" in container["command"] and not mounts["work"]["readOnly"]
    assert "metadata-cache:ttl-secs:0" in volumes["work"]["csi"]["volumeAttributes"]["mountOptions"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    *_, nfs = objects(VARIANTS["nfs"])
    template = job_of_slice(nfs)[1]["template"]
    assert template["spec"]["volumes"][0]["nfs"] == {"server": "10.0.0.2", "path": "/share", "readOnly": False}
    assert template["metadata"]["annotations"] == {}


def test_the_xpk_command_is_the_same_job():
    *storages, workload = gke.xpk_commands(VARIANTS["spot, two folders"], CLUSTER)
    given = dict(itertools.pairwise(workload))
    *_, jobset = objects(VARIANTS["spot, two folders"])
    slices, spec = job_of_slice(jobset)
    (container,) = spec["template"]["spec"]["containers"]
    assert shlex.split(given["--command"]) == container["command"]
    assert (given["--num-slices"], given["--tpu-type"]) == (str(slices), "v6e-256")
    assert str(environment.STOPPED) in given["--restart-on-exit-codes"].split(",")
    assert {f"{each['name']}={each['value']}" for each in container["env"]} <= set(workload)
    assert [storage[3] in workload for storage in storages] == [True, True]
    assert shlex.join(workload) in gke.submission(VARIANTS["spot, two folders"], CLUSTER).text


def test_what_gke_does_not_have_is_refused():
    with pytest.raises(ValueError, match="needs a TPU slice"):
        gke.submission(jobs.gpu(work=jobs.TPU.work, image=jobs.IMAGE), CLUSTER)
    with pytest.raises(ValueError, match="--image"):
        gke.submission(jobs.tpu(image=""), CLUSTER)
    with pytest.raises(ValueError, match="pods cannot see it"):
        gke.submission(jobs.tpu(work=folders.parse("--work", "/shared")), CLUSTER)
    with pytest.raises(ValueError, match="one host"):
        one = topology.parse_slice("v6e:2x2")
        gke.submission(jobs.tpu(hardware=one, slices=2, mesh=MeshShape(2, 4, 1)), CLUSTER)
    for name in ("Queue", "a_b", "a\nb: c"):
        with pytest.raises(ValueError, match="--queue is"):
            gke.Cluster(queue=name)


def test_a_hostile_override_stays_one_argument():
    override = "transformer.samples.prompts=(\"a: {b} # 'c' $(id)\",)"
    *_, jobset = objects(jobs.tpu(overrides=(override,)))
    (container,) = job_of_slice(jobset)[1]["template"]["spec"]["containers"]
    assert override in container["command"]
    with pytest.raises(ValueError, match="cannot be printed"):
        jobs.tpu(overrides=("a=b\nkind: Pod",))


@pytest.mark.parametrize("job", VARIANTS.values(), ids=VARIANTS)
def test_kubernetes_accepts_the_job_of_a_slice(job):
    require_packages("kubernetes_validate")
    import kubernetes_validate

    *_, jobset = objects(job)
    _, spec = job_of_slice(jobset)
    manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": spec}
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("job", VARIANTS.values(), ids=VARIANTS)
def test_the_published_schemas_of_jobset_and_kueue_accept_the_objects(job):
    if not os.environ.get(SCHEMAS):
        pytest.skip(f"{SCHEMAS} is not set: a folder with the custom resource definitions of JobSet and Kueue")
    require_packages("jsonschema")
    import jsonschema

    for each in objects(job):
        jsonschema.validate(each, schemas(os.environ[SCHEMAS])[each["apiVersion"], each["kind"]])
    *_, jobset = objects(job)
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(jobset, schemas(os.environ[SCHEMAS])[jobset["apiVersion"], jobset["kind"]])


@functools.cache
def schemas(folder):
    """{(apiVersion, kind): schema} of all definitions in a folder."""
    definitions = [yaml.safe_load(path.read_text()) for path in pathlib.Path(folder).glob("*.yaml")]
    return {
        (f"{each['spec']['group']}/{version['name']}", each["spec"]["names"]["kind"]): closed(
            version["schema"]["openAPIV3Schema"]
        )
        for each in definitions
        for version in each["spec"]["versions"]
    }


def closed(schema):
    """The schema without properties that it does not name: an API server would drop them silently."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items() if key != "description"}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and len(schema["properties"]) > 0:
        whole = "apiVersion" in schema["properties"]
        result["additionalProperties"] = False
        if whole and "metadata" in schema["properties"]:
            result["properties"]["metadata"] = {"type": "object"}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    return result

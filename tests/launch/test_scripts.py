"""The launch scripts together, their arguments, and the JobSet of GKE."""

import math
import pathlib
import subprocess
import sys

import pytest
import yaml

from tests.helpers.launching import LAUNCH, SLICE, launch, output

SCRIPTS = ["local.sh", "slurm.sbatch", "tpu_pod.sh", "tpu_worker.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash_and_explain_themselves(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    assert "flora_jax.main" in "\n".join(output(script, "--help"))


def test_shellcheck():
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, *SCRIPTS], cwd=LAUNCH, check=True)


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("tpu_pod.sh", ["launch", *SLICE], "unknown verb launch; accepted: create, push"),
        ("tpu_pod.sh", ["create", *SLICE], "--type is missing; give it, or set TPU_TYPE"),
        ("tpu_pod.sh", ["create", *SLICE, "--type=v9-8"], "give --runtime=VERSION"),
        ("tpu_pod.sh", ["run", *SLICE, "--workdir=gs://b/f"], "come after --"),
        ("tpu_pod.sh", ["run", *SLICE, "--", "--workdir=runs/a"], "accepted: gs://"),
        ("tpu_worker.sh", ["launch"], "unknown verb 'launch'; accepted:"),
        ("slurm.sbatch", ["--workdir=/shared/run"], "not inside a SLURM job"),
        ("local.sh", ["0", "--workdir=run"], "1 or more, not '0'"),
    ],
)
def test_wrong_arguments(script, arguments, message):
    done = launch(script, *arguments, *(["--dry-run"] if arguments[0] == "create" else []))
    assert done.returncode == 2
    assert message in done.stderr


def test_jobset_is_consistent():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    spec = jobset["spec"]
    assert spec["network"]["subdomain"] == jobset["metadata"]["name"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (job,) = (replicated["template"]["spec"] for replicated in spec["replicatedJobs"])
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    machines = math.prod(map(int, topology.split("x"))) // chips
    assert job["parallelism"] == job["completions"] == machines
    assert container["command"][:4] == ["python", "-m", "flora_jax.main", "--distributed"]

"""Claims about cluster/: its files are what Ray, KubeRay, bash and the jobs accept, and of one
version."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from commands import ROOT, run_here
from packaging.requirements import Requirement

import raycurv
from raycurv.jobs import registry

CLUSTER = ROOT / "cluster"
LAUNCHER = sorted((CLUSTER / "autoscaler").glob("*.yaml"))
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
PAGES = sorted(CLUSTER.rglob("*.md"))
BATCH = CLUSTER / "slurm" / "fit.sbatch"
DOCKERFILE = CLUSTER / "Dockerfile"
FILES = [*LAUNCHER, *KUBERAY, *PAGES, BATCH, DOCKERFILE]
EVERYTHING = {str(path.relative_to(ROOT)): path for path in FILES}

PINNED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
)
# The project's own table; tomllib is not there in Python 3.10.
PROJECT = (ROOT / "pyproject.toml").read_text()
TAG = rf"{re.escape(raycurv.__version__)}-ray{re.escape(PINNED['ray'])}-(cpu|gpu)"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that holds no other, with the name of the field it stands in."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, key)
    else:
        yield key, value


def places(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a document, itself included."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from places(inner)


# ---- schemas


@functools.cache
def schema_of(path: Path) -> dict[str, Any]:
    if path in KUBERAY:
        return json.loads((ROOT / "tests" / "kuberay_schema.json").read_text())
    return json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


def mistakes(path: Path, document: Any) -> list[str]:
    validator = jsonschema.validators.validator_for(schema_of(path))(schema_of(path))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("path", [*LAUNCHER, *KUBERAY], ids=lambda p: p.name)
def test_manifests_follow_their_schema(path: Path) -> None:
    assert mistakes(path, load(path)) == []


@pytest.mark.parametrize("path", KUBERAY, ids=lambda p: p.name)
def test_a_misspelt_field_is_refused_wherever_it_stands(path: Path) -> None:
    document = load(path)
    for place in places(document):
        for name in list(place):
            place[f"{name}x"] = place.pop(name)
            assert mistakes(path, document), f"{name}x is let through"
            place[name] = place.pop(f"{name}x")
    assert mistakes(path, document) == []


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda p: p.name)
def test_a_misspelt_field_of_the_launcher_is_refused(path: Path) -> None:
    document = load(path)
    kinds = document.get("available_node_types", {}).values()
    for place in (document, document["auth"], document["docker"], *kinds):
        for name in list(place):
            place[f"{name}x"] = place.pop(name)
            assert mistakes(path, document), f"{name}x is let through"
            place[name] = place.pop(f"{name}x")


@pytest.mark.parametrize("path", KUBERAY, ids=lambda p: p.name)
@pytest.mark.parametrize("wrong", [{}, [], None, 1.5, True], ids=repr)
def test_a_value_of_another_type_is_refused(path: Path, wrong: Any) -> None:
    document = load(path)
    for place in places(document):
        for name, value in list(place.items()):
            # Where a switch stands, a switch may stand.
            if isinstance(value, bool) and isinstance(wrong, bool):
                continue
            place[name] = wrong
            assert mistakes(path, document), f"{name}: {wrong!r} is let through"
            place[name] = value


def test_the_schema_has_no_field_that_no_manifest_uses() -> None:
    used = {name for path in KUBERAY for place in places(load(path)) for name in place}
    known = {
        name
        for place in places(schema_of(KUBERAY[0]))
        for name in place.get("properties", {})
        if isinstance(place.get("properties"), dict)
    }
    assert known == used


# ---- versions


def other_versions(text: str) -> list[str]:
    """Mentions of the image or of Ray with a version that is not pinned."""
    tags = re.findall(r"raycurv:[\w.-]+", text)
    other = [tag for tag in tags if not re.fullmatch(f"raycurv:{TAG}", tag)]
    mentions = r'rayVersion: "(.+)"', r"ray\[default\]==([\w.]+)", r"\bRay\s(\d+\.\d+\.\d+)"
    for mention in mentions:
        other += [v for v in re.findall(mention, text) if v != PINNED["ray"]]
    return other


@pytest.mark.parametrize("name", EVERYTHING)
def test_versions_and_tags_are_those_that_are_pinned(name: str) -> None:
    assert other_versions(EVERYTHING[name].read_text()) == []


def test_another_version_is_refused() -> None:
    path = CLUSTER / "kuberay" / "rayjob-cpu.yaml"
    text = path.read_text()
    assert text.count(PINNED["ray"]) == 3
    for start in [m.start() for m in re.finditer(re.escape(PINNED["ray"]), text)]:
        later = text[:start] + "2.61.0" + text[start + len(PINNED["ray"]) :]
        assert len(other_versions(later)) == 1


@pytest.mark.parametrize("path", [*LAUNCHER, *KUBERAY], ids=lambda p: p.name)
def test_every_image_is_tagged(path: Path) -> None:
    images = [v for key, v in leaves(load(path)) if key in ("image", "worker_image")]
    assert images or path.name == "volume.yaml"
    assert all(re.fullmatch(rf"([\w.]+/)?raycurv:{TAG}", image) for image in images)


def test_pyproject_admits_the_pinned_ray() -> None:
    (needed,) = [Requirement(r) for r in re.findall(r'^    "(ray\[.*)",$', PROJECT, re.M)]
    assert needed.specifier.contains(PINNED["ray"])
    assert not needed.specifier.contains("2.49.0")
    assert ray.__version__ == PINNED["ray"]


# ---- what the fields mean together


def clusters(document: Any) -> dict[str, Any]:
    return document["spec"].get("rayClusterSpec", document["spec"])


@pytest.mark.parametrize(
    "path", [p for p in KUBERAY if p.name != "volume.yaml"], ids=lambda p: p.stem
)
def test_pods_have_what_they_refer_to(path: Path) -> None:
    spec = clusters(load(path))
    claim = load(CLUSTER / "kuberay" / "volume.yaml")["metadata"]["name"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert str(ports["metrics"]) == group["rayStartParams"]["metrics-export-port"]
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        if "groupName" in group:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            kind = "gpu" if "nvidia.com/gpu" in resources["limits"] else "cpu"
            assert kind == group["groupName"] and container["image"].endswith(f"-{kind}")


@pytest.mark.parametrize("path", [p for p in LAUNCHER if p.stem != "onprem"], ids=lambda p: p.stem)
def test_the_launchers_kinds_of_nodes_go_together(path: Path) -> None:
    document = load(path)
    kinds = document["available_node_types"]
    head = kinds.pop(document["head_node_type"])
    assert head["resources"]["CPU"] == 0
    for name, kind in kinds.items():
        assert kind["min_workers"] <= kind["max_workers"] <= document["max_workers"]
        image = kind.get("docker", {}).get("worker_image", document["docker"]["image"])
        assert image.endswith("-gpu" if name.startswith("gpu") else "-cpu")


# ---- command lines


def joined(text: str) -> list[str]:
    """Lines, those that a backslash continues put together."""
    return re.sub(r"\\\n\s*", " ", text).splitlines()


def shell_lines(path: Path) -> list[str]:
    """Everything in a file that a shell would run; of pages, what their blocks show after ``$``."""
    if path.suffix == ".yaml":
        return [str(value) for _, value in leaves(load(path))]
    if path.suffix == ".md":
        blocks = re.findall(r"```console\n(.*?)```", path.read_text(), re.S)
        lines = [line.strip() for block in blocks for line in joined(block)]
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return joined(path.read_text())


def words_after(line: str, start: str) -> list[str]:
    """The words of a command that begins with ``start`` somewhere in a line."""
    words = shlex.split(line[line.index(start) :], comments=True)
    ends = [i for i, word in enumerate(words) if word in ("&", "|", "&&", ";", "--")]
    return words[: ends[0]] if ends else words


def job_commands(path: Path) -> list[list[str]]:
    if path == DOCKERFILE:
        (shown,) = re.findall(r"^CMD (.+)$", path.read_text(), re.M)
        return [json.loads(shown)]
    return [words_after(s, "python jobs/") for s in shell_lines(path) if "python jobs/" in s]


COMMANDS = {
    f"{name}#{place}": words
    for name, path in EVERYTHING.items()
    for place, words in enumerate(job_commands(path))
}


def refusal(words: list[str]) -> str:
    """What the job's own parser and checks say against a command line; empty if nothing."""
    python, script, *flags = words
    assert python == "python"
    if not (ROOT / script).is_file():
        return f"no {script}"
    job = registry.JOBS[Path(script).stem]
    kind, _ = job.load()

    def checked(settings: Any, reporter: Any) -> dict[str, Any]:
        settings.check()
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry.Job, "load", lambda self: (kind, checked))
        outcome = run_here(job.script, flags)
    return outcome.err or outcome.out if outcome.code else ""


def test_commands_are_found_where_they_are() -> None:
    found = {name.split("#")[0] for name in COMMANDS}
    assert {f"cluster/kuberay/rayjob-{kind}.yaml" for kind in ("cpu", "gpu")} <= found
    assert {"cluster/slurm/fit.sbatch", "cluster/Dockerfile"} <= found
    assert {str(p.relative_to(ROOT)) for p in PAGES if p.parent.name != "slurm"} <= found


@pytest.mark.parametrize("name", COMMANDS)
def test_the_jobs_accept_the_commands(name: str) -> None:
    assert refusal(COMMANDS[name]) == ""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("jobs/fit.py", "jobs/fits.py"),
        ("--stages", "--stagess"),
        ("float32", "float31"),
        ("--out", "--seed"),
    ],
)
def test_a_command_that_a_job_would_refuse_is_found(before: str, after: str) -> None:
    command = "python jobs/fit.py --model /m --data /d --out /o --stages 4 --dtype float32"
    assert refusal(shlex.split(command)) == ""
    assert refusal(shlex.split(command.replace(before, after))) != ""


@functools.cache
def ray_flags(command: str) -> frozenset[str]:
    """Flags of one of Ray's commands, as its help lists them."""
    shown = subprocess.run(
        [Path(sys.executable).with_name("ray"), command, "--help"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return frozenset(re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown, re.M))


def flags_of(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda p: p.name)
def test_ray_start_has_the_flags_that_the_launcher_gives(path: Path) -> None:
    starts = [words_after(s, "ray start") for s in shell_lines(path) if "ray start" in s]
    assert len(starts) == 2
    for words in starts:
        assert flags_of(words) <= ray_flags("start")
        assert "--metrics-export-port=8080" in words
    assert "--num-cpus=0" in starts[0] and "--head" in starts[0]
    assert "--num-cpu" not in ray_flags("start")


def test_ray_start_has_the_flags_that_kuberay_gives() -> None:
    names = {
        f"--{name}"
        for path in KUBERAY
        for place in places(load(path))
        for name in place.get("rayStartParams", {})
    }
    assert names and names <= ray_flags("start")


def test_symmetric_run_has_the_flags_that_the_batch_script_gives() -> None:
    (line,) = [s for s in shell_lines(BATCH) if "ray symmetric-run" in s]
    given = flags_of(words_after(line, "ray symmetric-run"))
    assert {"--address", "--min-nodes"} <= given & ray_flags("symmetric-run")
    # What it does not know it hands to `ray start`, but for these.
    assert given - ray_flags("symmetric-run") <= ray_flags("start")
    assert not given & {"--head", "--node-ip-address", "--port", "--block"}


# ---- shell


def said_by_bash(text: str) -> str:
    return subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True).stderr


def test_bash_reads_the_batch_script() -> None:
    text = BATCH.read_text()
    assert said_by_bash(text) == ""
    assert said_by_bash(text.replace("; fi", "")) != ""


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda p: p.name)
def test_bash_reads_the_launchers_commands(path: Path) -> None:
    lists = {key: value for key, value in load(path).items() if key.endswith("_commands")}
    assert "head_start_ray_commands" in lists and "initialization_commands" in lists
    assert [
        said_by_bash(line) for lines in lists.values() for line in lines if said_by_bash(line)
    ] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.parent.name)
def test_bash_reads_the_commands_of_the_pages(path: Path) -> None:
    assert shell_lines(path)
    assert [line for line in shell_lines(path) if said_by_bash(line)] == []


# Slurm and Ray as far as the script can tell: run what stands at the end of the command line.
STAND_INS = {
    "scontrol": 'if [[ $1 == show ]]; then echo n1; echo n2; else echo "$@" >"$ROOM/requeued"; fi',
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "ray": 'while (($#)) && [[ $1 != -- ]]; do shift; done; shift || exit 0; "$@"',
    # The driver: works until it is told, then commits and exits.
    "python": 'trap \'echo yes >"$ROOM/committed"; exit 3\' TERM; '
    'echo "$@" >"$ROOM/new"; mv "$ROOM/new" "$ROOM/driver"; '
    'while [[ ! -e $ROOM/done ]]; do sleep 0.05; done',
}  # fmt: skip


@pytest.fixture
def submitted(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The batch script as Slurm would run it, its driver at work."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, does in STAND_INS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tools / name).chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "4", "TMPDIR": str(tmp_path),
        "ROOM": str(tmp_path), "PATH": f"{tools}:{os.environ['PATH']}",
    }  # fmt: skip
    process = subprocess.Popen(["bash", str(BATCH)], env=os.environ | job, text=True)
    while not (tmp_path / "driver").exists():
        assert process.poll() is None, "the script ended before its driver began"
        time.sleep(0.05)
    yield process
    (tmp_path / "done").touch()
    process.wait(timeout=10)


@pytest.mark.parametrize(("told", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_batch_that_is_told_to_end_commits(
    submitted: subprocess.Popen[str], tmp_path: Path, told: signal.Signals, requeued: bool
) -> None:
    assert "jobs/fit.py --address n1:6379" in (tmp_path / "driver").read_text()
    submitted.send_signal(told)
    assert submitted.wait(timeout=10) == 3
    assert (tmp_path / "committed").exists()
    # Only the end of its time puts it back into the queue; who stops it means it.
    assert (tmp_path / "requeued").exists() == requeued
    assert not (tmp_path / "raycurv-7.pid").exists()


def test_a_batch_that_is_done_ends_well(submitted: subprocess.Popen[str], tmp_path: Path) -> None:
    (tmp_path / "done").touch()
    assert submitted.wait(timeout=10) == 0
    assert not (tmp_path / "committed").exists() and not (tmp_path / "requeued").exists()


# ---- the image


INSTRUCTIONS = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}


def instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = [line.partition(" ") for line in joined("\n".join(lines)) if line.strip()]
    unknown = {word for word, _, _ in found} - INSTRUCTIONS
    assert not unknown, f"no instructions of a Dockerfile: {unknown}"
    return [(word, rest) for word, _, rest in found]


def sent_to_the_builder(name: str) -> bool:
    """Whether .dockerignore, which refuses all but what it names, lets a path through."""
    first, *rest = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    return first == "*" and f"!{name}" in rest


def test_the_image_is_made_of_files_that_are_there() -> None:
    steps = instructions(DOCKERFILE.read_text())
    copied = [src for word, rest in steps if word == "COPY" for src in shlex.split(rest)[:-1]]
    assert {"constraints.txt", "pyproject.toml", "raycurv", "jobs"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists() and sent_to_the_builder(name)
    assert not sent_to_the_builder(".git") and not sent_to_the_builder("tests")
    # What the project's own table reads when it is built.
    for name in re.findall(r'readme = "(.+)"|license-files = \["(.+)"\]', PROJECT):
        assert set(filter(None, name)) <= set(copied)
    with pytest.raises(AssertionError, match="COPPY"):
        instructions("COPPY a b")


def test_the_image_installs_what_is_pinned() -> None:
    steps = instructions(DOCKERFILE.read_text())
    assert dict(steps)["FROM"] == "${BASE}" and steps[0] == ("ARG", "BASE=python:3.11-slim")
    installs = [rest for word, rest in steps if word == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in command for command in installs)
    declared = {rest.partition("=")[0] for word, rest in steps if word == "ARG"}
    used = {name for _, rest in steps for name in re.findall(r"\$\{(\w+)\}", rest)}
    assert used == declared


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.parent.name)
def test_build_arguments_that_the_pages_name_exist(page: Path) -> None:
    declared = re.findall(r"^ARG (\w+)", DOCKERFILE.read_text(), re.M)
    assert set(re.findall(r"--build-arg (\w+)=", page.read_text())) <= set(declared)


# ---- pages


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def dead_links(page: Path, text: str) -> list[str]:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if target.is_dir() or not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.parent.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    assert dead_links(page, text) == []
    assert dead_links(page, "[a](nowhere.md) [b](README.md#nowhere)") == [
        "nowhere.md", "README.md#nowhere",
    ]  # fmt: skip


@pytest.mark.parametrize("folder", ["kuberay", "autoscaler", "slurm"])
def test_every_file_stands_in_its_page(folder: str) -> None:
    page = (CLUSTER / folder / "README.md").read_text()
    files = {p.name for p in (CLUSTER / folder).iterdir()} - {"README.md"}
    assert files and all(f"]({name})" in page for name in files)

"""The job of doctor.py: what is installed, what this machine has, what a fit here could hold.

requirements    of raycurv and of its extras, each imported
machine         cores, threads, memory, GPUs, disks, limits
Ray             whether one answers, or starts
capacity        the plan of a model, or the largest of Llama's shape that fits

Nothing is kept, and nothing is asked of a network but of a cluster at ``--address``, and of the hub
where ``--model`` is a name there.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_info

import raycurv
from raycurv.driver.workers import look_for_ray, ray_directory
from raycurv.errors import UserError, in_words
from raycurv.jobs.doctor.doctor_settings import DoctorSettings
from raycurv.jobs.plan.estimating import plan
from raycurv.jobs.plan.plan_settings import PlanSettings
from raycurv.jobs.requirements import PURPOSES, requirements, together
from raycurv.planning.rates import Rates, measure
from raycurv.planning.report import duration, size
from raycurv.planning.supply import (
    cores_here,
    existing_parent,
    free_disk,
    memory_here,
    process_here,
)
from raycurv.progress.streams import printable, results

# Below these a person should know: files of a process that Ray's servers ask for; room for what a
# job writes first; Ray's object store, which otherwise goes to disk.
_FILES, _DISK, _SHARED = 4096, 10**9, 10**9
# A fit for which capacities are said.
_EXAMPLES, _TOKENS = 1000, 512
# How a model may be run, and the settings that say so.
_WAYS: Mapping[str, dict[str, Any]] = {
    "resident": {"schedule": "pipelined", "stages": 1},
    "swept": {"schedule": "swept"},
}


@dataclass
class _Findings:
    """What is found, printed as it is found.

    Attributes:
        facts: for the last line.
        needed: problems for which no fit runs here.
        advice: other ones.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    needed: list[UserError] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def say(self, what: str, text: str, **facts: Any) -> None:
        """A line, and the same for machines."""
        print(printable(f"{what:<17}{text}"), file=results(), flush=True)
        self.facts |= facts

    def problem(self, error: UserError, needed: bool) -> None:
        """Note a mistake: if ``needed`` one that keeps a local fit from running, else advice."""
        if needed:
            self.needed.append(error)
        else:
            self.advice.append(str(error))


def examine(settings: DoctorSettings) -> dict[str, Any]:
    """Print what is found; gives the same for the last line.

    Raises:
        UserError: what a fit on this machine needs is missing or too old, or the cluster or the
            model that is asked for cannot be used; all of it is named, when all else is printed.
    """
    settings.check()
    found = _Findings()
    # First: where a Ray of a job's own listens is settled before anything imports Ray.
    try:
        ray = look_for_ray(settings.address)
    except UserError as error:
        ray = "see below"
        found.problem(error, True)
    _versions(found)
    _machine(found)
    _disks(found, settings)
    found.say("Ray", ray, ray=ray)
    if not found.needed:
        _capacity(found, settings)
    for sentence in (*map(str, found.needed), *found.advice):
        found.say("to do", sentence)
    if found.needed:
        raise together(found.needed)
    return found.facts | {"to_do": found.advice}


def _versions(found: _Findings) -> None:
    """Print the versions of Python, raycurv and its requirements, and note what is missing, broken
    or too old."""
    running = platform.python_version()
    found.say("raycurv", f"{raycurv.__version__} in {Path(raycurv.__file__).parent}")
    found.say("Python", f"{running} on {platform.platform()}")
    versions = {"raycurv": raycurv.__version__, "python": running}
    try:
        for one in requirements():
            what = f"extra {one.extra}" if one.extra else "needs"
            there = one.problem or one.version
            purpose = f" ({PURPOSES[one.extra]})" if one.extra else ""
            remedy = f": {one.as_error().remedy}" if one.problem else ""
            found.say(what, f"{one.text}: {there}{purpose}{remedy}")
            versions[one.text] = there
            if one.problem and (one.version or not one.extra):
                found.problem(one.as_error(), not one.extra)
    except UserError as error:
        found.problem(error, False)
    found.facts["versions"] = versions


def _machine(found: _Findings) -> None:
    """Cores, memory, GPUs, limits."""
    cores, quota = cores_here()
    limited = "" if quota is None else f", time of {quota:g} (limit of this control group)"
    blas = {f"{one['internal_api']} {one['num_threads']}" for one in threadpool_info()}
    threads = torch.get_num_threads()
    pools = ", ".join(sorted(blas))
    found.say("cores", f"{cores}{limited}; torch {threads} threads, libraries: {pools}")
    memory, limit = memory_here()
    process = process_here()
    alone = "" if process is None else f"; {size(process)} a process (RLIMIT_DATA)"
    found.say("memory", f"{size(memory)} left ({limit}){alone}")
    gpus = list(_gpus(found))
    found.say("GPUs", ", ".join(gpus) or f"none that torch {torch.__version__} sees")
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    found.say("open files", f"{files:,}, at most {most:,}")
    # Ray raises the soft limit by itself.
    if 0 <= most < _FILES:
        found.problem(
            UserError(
                "open files", f"{_FILES:,} or more", f"{most:,}",
                f"Raise the limit (ulimit -n {_FILES}), or use --address none.",
            ),
            False,
        )  # fmt: skip
    found.facts |= {"cores": cores, "threads": threads, "memory": memory, "gpus": gpus}


def _gpus(found: _Findings) -> Iterator[str]:
    try:
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            yield f"{name}, {size(free)} free of {size(total)}"
    except RuntimeError as error:
        found.problem(
            UserError(
                "GPUs", "a GPU that answers", in_words(error),
                "Look at nvidia-smi, or fit with --device cpu.",
            ),
            False,
        )  # fmt: skip


def _disks(found: _Findings, settings: DoctorSettings) -> None:
    """Free disk where a job writes, and whether it may write there."""
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError as error:
        temporary = None
        remedy = "Make room there, or set TMPDIR to a directory to write to."
        where = UserError("TMPDIR", "a directory for temporary files", in_words(error), remedy)
        found.problem(where, True)
    places = {
        "--out": settings.out if settings.out is not None else ".",
        "--spool-dir": settings.spool_dir,
        "TMPDIR": temporary,
        "Ray's files": str(ray_directory()),
        "/dev/shm": "/dev/shm",
    }
    disks = {}
    for what, named in places.items():
        if named is None or "://" in named:
            continue
        place = existing_parent(Path(named).expanduser().absolute())
        disks[what] = free = free_disk(place)
        writable = os.access(place, os.W_OK | os.X_OK) and place.is_dir()
        found.say(what, f"{size(free)} free at {place}{'' if writable else ', not writable'}")
        least, remedy = _DISK, "Make room, or name another place."
        if what == "/dev/shm":
            least, remedy = (
                _SHARED,
                "Make it larger (docker run --shm-size), or use --address none.",
            )
        if free < least:
            problem = UserError(what, f"{size(least)} free or more", size(free), remedy)
            found.problem(problem, False)
        if not writable:
            problem = UserError(
                what, "a directory to write to", str(place), "Name another one, or change its mode."
            )
            found.problem(problem, named in (settings.out, settings.spool_dir))
    found.facts["disks"] = disks


def _capacity(found: _Findings, settings: DoctorSettings) -> None:
    """What a fit here could hold, by the sums of the planner."""
    out = settings.out or "."
    place = None if "://" in out else Path(out).expanduser().absolute()
    rates = measure(torch.float32, place)
    shared: dict[str, Any] = {
        "out": out,
        "spool_dir": settings.spool_dir,
        "json": True,
        "address": "none",
    }
    shared |= {"examples": _EXAMPLES, "tokens": _TOKENS}
    what = f"{_EXAMPLES:,} examples of {_TOKENS} tokens, float32, and scores of 100 queries"
    found.say("a fit here", f"of {what}:")
    said: dict[str, Any] = {}
    if settings.model is not None:
        named: dict[str, Any] = {"model": settings.model}
        named |= {"trust_remote_code": settings.trust_remote_code}
        for way, how in _WAYS.items():
            try:
                planned = plan(PlanSettings(**named, **shared, **how), rates=rates)
            except UserError as error:
                found.problem(error, True)
                return
            said[way] = planned["fits"]
            found.say(way, ("fits" if planned["fits"] else "does not fit") + f": {_taken(planned)}")
    else:
        for way, how in _WAYS.items():
            found.say(way, _largest(shared | how, rates, said, way))
    found.facts["holds"] = said


def _taken(planned: dict[str, Any]) -> str:
    """Memory, disk and time of a planned fit, in words."""
    fit = planned["plans"]["fit"]
    return (
        f"{size(fit['memory'])} of memory, {size(fit['disk'])} of disk, "
        f"{duration(fit['seconds'])} for the fit"
    )


def _largest(settings: dict[str, Any], rates: Rates, said: dict[str, Any], way: str) -> str:
    """The largest model of Llama's shape that fits, a factor of about 2 from one that does not."""
    low, high = 0, len(_WIDTHS)
    best, lacking = "nothing of those that were tried", ""
    said[way] = 0
    with tempfile.TemporaryDirectory() as folder:
        while low < high:
            middle = (low + high) // 2
            config = Path(folder) / "config.json"
            config.write_text(json.dumps(_llama(_WIDTHS[middle])))
            planned = plan(PlanSettings(model=folder, **settings), rates=rates)
            if not planned["fits"]:
                high = middle
                lacking = ", ".join(dict.fromkeys(one["what"] for one in planned["short"]))
                continue
            low = middle + 1
            said[way] = parameters = planned["sizes"]["weights"] // 4
            best = f"up to {parameters / 1e9:.2g} billion parameters of Llama's shape"
            best += f": {_taken(planned)}"
    return f"{best}; the next larger one lacks {lacking}" if lacking else best


# Of the hidden states of models of Llama's shape, each with about twice the parameters of the one
# before: 0.01 to 70 billion.
_WIDTHS = (256, 384, 512, 768, 1024, 1280, 1664, 2048, 2560, 3328, 4096, 5120, 6656, 8192)


def _llama(width: int) -> dict[str, Any]:
    """The configuration of a model of Llama's shape."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": max(4, width // 128),
        "num_attention_heads": width // 128,
        "vocab_size": 32_000,
    }

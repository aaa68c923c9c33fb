"""Which files of a repository on the hub are fetched: what raycurv reads of a directory, no more.

Configurations, a tokenizer and safetensors, of the repository's own folder alone. A pickle is never
fetched, nor is Python code, but of a model whose code is trusted.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from raycurv.hub import Commit, Snapshot
from raycurv.models.adapter import ADAPTER
from raycurv.models.checkpoint import INDEX, SINGLE, indexed_files
from raycurv.models.checkpoint_files import ALONG, PLAIN, TEMPLATES
from raycurv.models.directories import check_names


def bring(commit: Commit, what: str, weights: bool = True, code: bool = False) -> Snapshot:
    """Have what is read of a repository on this machine.

    Args:
        what: it is: a ``model``, an ``adapter`` or a ``tokenizer``.
        weights: whether those of a model are read.
        code: whether its Python files are.

    Raises:
        UserError: there is no such thing in it, or it cannot be fetched.
    """
    top = sorted(name for name in commit.files if "/" not in name)
    of_model = what == "model"
    if of_model:
        directory = commit.snapshot(()).directory
        check_names(f"model {commit.where}", directory, top, weights)
    endings = tuple(ending for ending in ALONG if code or ending != ".py")
    wanted = [name for name in top if name.endswith(endings) or name in PLAIN]
    wanted += [n for n in commit.files if PurePosixPath(n).match(f"{TEMPLATES}/*.jinja")]
    if ADAPTER in top and (what == "adapter" or (of_model and weights)):
        wanted.append(ADAPTER)
    if of_model and weights and SINGLE in top:
        wanted.append(SINGLE)
    elif of_model and weights:
        index = commit.snapshot([INDEX])
        index.bring()
        wanted += indexed_files(index.directory)
    snapshot = commit.snapshot(wanted)
    snapshot.bring()
    return snapshot

"""Repositories of the Hugging Face hub that a person names, and the snapshots of them on a machine.

    hub_name(text, kind) -> HubName | None     org/name[@revision], of data also :config
    find(name, where) -> Commit                one request: which commit that is, and its files
    cached(name, where) -> Commit              the same of the hub's cache, without any request
    commit.snapshot(files) -> Snapshot         which travels, and brings its files wherever it is

A snapshot lies at the same path on every machine, in the cache of the one that found it, so that
whatever names its files can travel as it is. Only files that the caller asked for are brought, by
``huggingface_hub``: below their commit, complete or not at all. No message holds what the hub
answered, or a token: of an answer its status is told.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from raycurv.errors import UserError, in_words, shortened
from raycurv.names import plain_name

_SHAPE = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.][\w./-]*))?(:(?P<config>[\w.-]+))?", re.ASCII
)
COMMIT = re.compile(r"[0-9a-f]{40}")
# Of one request; a download waits as long for its next bytes.
_SECONDS = 10.0
_OFFLINE = (
    "Check the name, or the path. HF_HUB_OFFLINE is set, so nothing is fetched: unset it where "
    "there is a network."
)
_LOGIN = "HF_TOKEN in the environment, or hf auth login"


@dataclass(frozen=True)
class HubName:
    """A repository as a person names it.

    Attributes:
        repo: such as ``org/name``.
        revision: a branch, a tag or a commit; empty for the main branch.
        config: of data, which of its sets; empty for the one that is meant without.
        kind: ``model`` (of adapters and tokenizers, too) or ``dataset``.
    """

    repo: str
    revision: str
    config: str
    kind: str

    def at(self, commit: str) -> HubName:
        """The name of the same repository and configuration with a commit for its revision."""
        return HubName(self.repo, commit, self.config, self.kind)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f":{self.config}" if self.config else "")


def hub_name(text: str, kind: str) -> HubName | None:
    """What a text names on the hub: nothing if it is a path that exists, or no such name."""
    found = _SHAPE.fullmatch(text)
    if found is None or os.path.exists(text) or (found["config"] and kind != "dataset"):
        return None
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(found["repo"])
    except HFValidationError:
        return None
    return HubName(found["repo"], found["revision"] or "", found["config"] or "", kind)


@dataclass(frozen=True)
class Snapshot:
    """Some files of a repository at a commit.

    Attributes:
        name: with the commit as its revision.
        cache: directory of the hub's cache, the same on every machine.
        files: names of those that are taken.
        unfetched: why what is not here is not fetched, and what to do; empty where it is.
    """

    name: HubName
    cache: str
    files: tuple[str, ...]
    unfetched: str

    @property
    def directory(self) -> Path:
        """The directory of the cache that holds, or is to hold, the files of this commit."""
        return _repository(self.cache, self.name) / "snapshots" / self.name.revision

    def bring(self) -> None:
        """Have the files on this machine, with no request if they are.

        Raises:
            UserError: the hub does not give them, or is not asked.
        """
        lacking = [name for name in self.files if not (self.directory / name).exists()]
        if not lacking:
            return
        if self.unfetched:
            raise UserError(
                f"{self.name} of the hub", f"{lacking[0]} in {self.directory}", "no such file",
                self.unfetched,
            )  # fmt: skip
        from huggingface_hub import snapshot_download

        try:
            with _bars_on_terminals():
                snapshot_download(
                    self.name.repo,
                    repo_type=self.name.kind,
                    revision=self.name.revision,
                    cache_dir=self.cache,
                    allow_patterns=[glob.escape(name) for name in lacking],
                )
        except Exception as error:
            raise _refused(self.name, f"{self.name} of the hub", error) from None
        for name in lacking:
            if not (self.directory / name).exists():
                raise UserError(
                    f"{self.name} of the hub", f"the file {name} in {self.cache}", "none",
                    "Check that this directory can be written and has room (HF_HOME names another "
                    "one), and run the same command again.",
                )  # fmt: skip

    def __str__(self) -> str:
        return str(self.name)


@dataclass(frozen=True)
class Commit:
    """A commit of a repository.

    Attributes:
        name: with the commit as its revision.
        files: names of all that it has; or, without a request, of those in the cache.
        cache: directory of the hub's cache.
        unfetched: as of a :class:`Snapshot`.
    """

    name: HubName
    files: tuple[str, ...]
    cache: str
    unfetched: str = ""

    @property
    def where(self) -> str:
        """How an error message names this repository and, where files are missing, the cache."""
        return f"{self.name} of the hub" + (
            f", in the cache {self.cache}" if self.unfetched else ""
        )

    def snapshot(self, files: Sequence[str]) -> Snapshot:
        """With some of the files; UserError for a name that leads out of the repository."""
        for name in files:
            plain_name(name, self.where)
        return Snapshot(self.name, self.cache, tuple(files), self.unfetched)


def find(name: HubName, where: str) -> Commit:
    """Which commit a name means, by one request; with HF_HUB_OFFLINE=1 by the cache.

    Args:
        where: what named it, for messages.

    Raises:
        UserError: what was tried, and what to do.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return cached(name, where, _OFFLINE)
    try:
        info = HfApi().repo_info(
            name.repo, repo_type=name.kind, revision=name.revision or None, timeout=_SECONDS
        )
        commit = str(info.sha)
        files = tuple(str(one.rfilename) for one in info.siblings or ())
    except Exception as error:
        raise _refused(name, where, error) from None
    if not COMMIT.fullmatch(commit):
        raise _no_answer(name, where, "an answer without a commit")
    _remember(name, commit)
    return Commit(name.at(commit), files, _cache())


def cached(name: HubName, where: str, unfetched: str) -> Commit:
    """What the hub's cache has of a repository, without any request.

    Args:
        where: what named it, for messages.
        unfetched: why no more is fetched, and what to do.

    Raises:
        UserError: nothing of this revision.
    """
    commit, place = _cached_commit(name), _repository(_cache(), name)
    snapshot = place / "snapshots" / commit
    if not commit or not snapshot.is_dir():
        raise UserError(
            where, f"a directory, or {_of(name)} in the cache, {place}",
            f"no directory of that name, and nothing of {name} there", unfetched,
        )  # fmt: skip
    files = sorted(path for path in snapshot.rglob("*") if not path.is_dir())
    names = tuple(path.relative_to(snapshot).as_posix() for path in files)
    return Commit(name.at(commit), names, _cache(), unfetched)


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """While files are fetched: bars of their progress on a terminal, and none in a log."""
    from huggingface_hub import utils

    if sys.stderr.isatty() or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _cached_commit(name: HubName) -> str:
    """The commit that a revision meant when it was asked for last; empty for none."""
    if COMMIT.fullmatch(name.revision):
        return name.revision
    reference = _reference(name)
    commit = reference.read_text()[:64].strip() if reference.is_file() else ""
    return commit if COMMIT.fullmatch(commit) else ""


def _remember(name: HubName, commit: str) -> None:
    """Note in the cache what a revision means, as huggingface_hub does."""
    if name.revision == commit:
        return
    reference = _reference(name)
    part = reference.with_name(f"{reference.name}.{os.getpid()}.part")
    # Of a cache that cannot be written what it has is read.
    with suppress(OSError):
        reference.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(commit)
        part.replace(reference)


def _reference(name: HubName) -> Path:
    # A revision may hold slashes, and no step of it leads upwards.
    folder = _repository(_cache(), name) / "refs"
    return folder / plain_name(name.revision or "main", f"{name} of the hub")


def _cache() -> str:
    from huggingface_hub import constants

    return os.path.abspath(os.path.expanduser(str(constants.HF_HUB_CACHE)))


def _repository(cache: str, name: HubName) -> Path:
    return Path(cache) / f"{name.kind}s--{name.repo.replace('/', '--')}"


def _of(name: HubName) -> str:
    return f"a {'data set' if name.kind == 'dataset' else name.kind} of the hub"


def _refused(name: HubName, where: str, error: Exception) -> UserError:
    """The mistake that an error of huggingface_hub's stands for."""
    from huggingface_hub import errors, get_token

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is None and isinstance(error, OSError) and error.errno is not None:
        return UserError(
            where, f"the cache {_cache()}, to fetch {name} into", in_words(error),
            "Make room in it or let it be written; HF_HOME names another one, the same on all "
            "nodes of a cluster.",
        )  # fmt: skip
    if status is None:
        return _no_answer(name, where, f"none ({type(error).__name__})")
    said = f"HTTP {status}"
    token = f"a token of an account that may read it ({_LOGIN})"
    if isinstance(error, errors.GatedRepoError):
        got = "a gated one, open to accounts that have accepted its terms"
        page = f"{_endpoint()}/{'datasets/' if name.kind == 'dataset' else ''}{name.repo}"
        return _error(name, where, f"{got} ({said})", f"Accept its terms at {page}; give {token}.")
    if isinstance(error, errors.RevisionNotFoundError):
        got = f"no branch, tag or commit {name.revision or 'main'} there ({said})"
        return _error(name, where, got, "Check what stands behind the @.")
    if isinstance(error, errors.EntryNotFoundError):
        got = f"a file that is listed and not there ({said})"
        return _error(name, where, got, "Run the same command again.")
    if status == 403:
        return _error(name, where, f"one that this token may not read ({said})", f"Give {token}.")
    if status in (401, 404):
        of = "for this token " if get_token() else ""
        got = f"none of that name {of}({said}): it does not exist, or is private"
        remedy = f"Check the name, or the path; of a private one give {token}."
        return _error(name, where, got, remedy)
    return _no_answer(name, where, said)


def _no_answer(name: HubName, where: str, got: str) -> UserError:
    commit = _cached_commit(name)
    kept = commit and (_repository(_cache(), name) / "snapshots" / commit).is_dir()
    use = f" HF_HUB_OFFLINE=1 takes the commit {commit} of the cache." if kept else ""
    return UserError(
        where, f"a directory, or an answer of the hub at {_endpoint()} about {name}",
        f"no directory of that name, and of the hub {shortened(got)}",
        "Check the path, or the network (HF_ENDPOINT names another hub, HTTPS_PROXY a way to it), "
        f"and run the same command again.{use}",
    )  # fmt: skip


def _error(name: HubName, where: str, got: str, remedy: str) -> UserError:
    expected = f"a directory, or {_of(name)} at {_endpoint()}"
    return UserError(where, expected, f"no directory of that name here, and there {got}", remedy)


def _endpoint() -> str:
    from huggingface_hub import constants

    return re.sub("//[^/]*@", "//", str(constants.ENDPOINT))

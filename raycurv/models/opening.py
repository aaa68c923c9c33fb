"""Opening a model by what a person names: an HF directory, or a function that makes a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from raycurv.errors import UserError
from raycurv.models.adapter import Adapters
from raycurv.models.factory import FactoryModel
from raycurv.models.model import Model, Outline
from raycurv.named_objects import is_named_object

ModelSource = str | Callable[[], nn.Module]
NONE = Adapters()


def open_model(
    source: ModelSource,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    ignored: Sequence[str] = (),
    adapters: Adapters = NONE,
) -> Model:
    """Describe a model.

    Args:
        source: a directory with an HF ``config.json`` and safetensors; the name
            ``package.module:factory`` of a callable that returns an ``nn.Module``; or the callable.
        base: directory that relative names start from; the working directory when ``None``.
        trust_remote_code: run the code that an HF directory brings along, if it does.
        ignored: globs on the names of tensors that an HF directory has and its model may leave
            unused.
        adapters: on an HF directory.

    Raises:
        UserError: what the source names is not there, or is not such a model.
    """
    found = _factory_or_directory(source, base)
    if isinstance(found, FactoryModel):
        return _without_adapters(found, adapters)
    return open_directory(found, str(source), trust_remote_code, ignored, adapters)


def open_directory(
    directory: Path,
    name: str | None = None,
    trust_remote_code: bool = False,
    ignored: Sequence[str] = (),
    adapters: Adapters = NONE,
) -> Model:
    """Describe the model in an HF directory; nothing is imported by its name.

    Args:
        directory: with ``config.json`` and safetensors.
        name: what the user gave; the directory when ``None``.
        trust_remote_code: run the code that it brings along, if it does.
        ignored: globs on the names of tensors that its model may leave unused.
        adapters: on it.

    Raises:
        UserError: it is not there, or no such model; an adapter that is not one of it.
    """
    # Importing transformers takes seconds and memory that other models need not pay for.
    from raycurv.models.adapted import AdaptedModel, MergedModel
    from raycurv.models.hf import HFModel

    name = name or str(directory)
    if not adapters.given():
        return HFModel(name, directory, trust_remote_code, ignored)
    kind = MergedModel if adapters.merged else AdaptedModel
    return kind(name, directory, adapters, trust_remote_code, ignored)


def open_outline(
    source: ModelSource, trust_remote_code: bool = False, adapters: Adapters = NONE
) -> Outline:
    """As :func:`open_model`, but of an HF directory ``config.json`` alone is read, and of adapters
    their headers."""
    found = _factory_or_directory(source, None)
    if isinstance(found, FactoryModel):
        return _without_adapters(found, adapters)
    from raycurv.models.adapted import AdaptedOutline
    from raycurv.models.hf import HFOutline

    # Merged ones leave the weights as many as they are.
    if adapters.given() and not adapters.merged:
        return AdaptedOutline(str(source), found, adapters, trust_remote_code)
    return HFOutline(str(source), found, trust_remote_code)


def _without_adapters(model: FactoryModel, adapters: Adapters) -> FactoryModel:
    if adapters.given():
        raise UserError(
            f"--adapter {adapters.directories[0]}",
            "a directory as --model, with the base's weights", f"the factory {model.name}",
            "Put PEFT's modules in within the factory: their matrices have blocks, and what PEFT "
            "freezes has none.",
        )  # fmt: skip
    return model


def _factory_or_directory(source: ModelSource, base: str | Path | None) -> FactoryModel | Path:
    folder = Path.cwd() if base is None else Path(base).absolute()
    if isinstance(source, str):
        directory = folder / Path(source).expanduser()
        if not directory.exists() and is_named_object(source):
            return FactoryModel(source, None, folder)
        return directory
    # A module is callable, too, but calling it is a forward.
    if not callable(source) or isinstance(source, nn.Module):
        raise UserError(
            "model",
            "a directory, package.module:factory, or a callable",
            f"a {type(source).__name__}",
            "Pass a function that builds the network, not the network.",
        )
    module = getattr(source, "__module__", None) or "?"
    name = getattr(source, "__qualname__", type(source).__qualname__)
    return FactoryModel(f"{module}:{name}", source, folder)

"""An HF model in one piece: as one stage, where its layers speak past the hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from raycurv.batch import Batch, Hidden
from raycurv.models.anatomy import TRIED, WAYS, Anatomy, Given, run_on_meta
from raycurv.models.hf_calls import calling, given_beside, padded_ids
from raycurv.models.model import Segment
from raycurv.models.travelling import Travels


class WholeSegment(Segment):
    """A whole HF model, whose outputs are what the objective takes."""

    first = last = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def forward(self, batch: Batch, hidden: Hidden | None) -> Hidden:
        """The outputs ``[N S, V]`` or ``[N S, T, V]``, alone in a tuple."""
        assert hidden is None, "there is no segment before it"
        ids = padded_ids(self.module, batch).clamp_min(0)
        with calling(self.module, ids):
            return (self.module(input_ids=ids, **given_beside(self.module, batch)).logits,)


def whole_anatomy(whole: Any) -> Anatomy:
    """The anatomy of a model that is not cut: one unit that holds everything."""
    ran: Given | None = None
    called: set[nn.Module] = set()
    modules = dict(whole.named_modules())
    hooks = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for m in modules.values()]
    for given in WAYS:
        called.clear()
        try:
            run_on_meta(whole, *TRIED, given)
            ran = given
            break
        except Exception:  # foreign code, which may read values that there are not
            continue
    for hook in hooks:
        hook.remove()
    # What is not called is used by what holds it, if that is called; else it does not run.
    own = {
        name for name, m in modules.items() if next(m.parameters(recurse=False), None) is not None
    }
    apart = {name for name in own if ran is not None and modules[name] not in called}
    held = {name for name in apart if modules[_holder(name, modules)] in called}
    return Anatomy(
        layers="", count=1, outputs=(0,), travels=Travels(((),), (), (), (0, 1), 0), embedding="",
        width=0, made={}, head="", early=frozenset(), late=frozenset(),
        idle=frozenset(apart - held), held=frozenset(held), tied=False, given=ran, pooled=False,
        causal=False, numel={"": sum(p.numel() for p in whole.parameters())},
    )  # fmt: skip


def lists_of_layers(whole: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of what is in the outermost lists of layers, but for embeddings in
    them, such as of distances; none for no list."""
    lists: list[str] = []
    found: list[str] = []
    for name, module in whole.named_modules():  # a module comes before its parts
        if not (lists and name.startswith(tuple(lists))):
            if isinstance(module, nn.ModuleList):
                lists.append(f"{name}.")
            else:
                continue
        if found and name.startswith(tuple(found)):
            continue
        if not any(isinstance(part, nn.Embedding) for part in module.modules()):
            found.append(f"{name}." if next(module.children(), None) is not None else name)
    return tuple(found)


def _holder(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The name of what holds a module, lists left out."""
    holder = name.rpartition(".")[0]
    lists = nn.ModuleList | nn.ModuleDict
    return _holder(holder, modules) if isinstance(modules[holder], lists) else holder

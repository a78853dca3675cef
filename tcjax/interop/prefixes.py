"""Where a part's tensors lie in a checkpoint: alone, or inside a larger model that puts a prefix before each name.

    Layout("LLaVA", {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}, others=("vision_tower.",))

The layout is known by one tensor that every checkpoint of the part has (`sign`), never by the folder's name. The list of
layouts is closed: a checkpoint that fits none of them, or two, is an error that says which prefixes it does have.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tcjax.interop.mismatch import collapse

_LINES = 12  # of an error; a checkpoint of another architecture has few kinds of names


@dataclass(frozen=True)
class Layout:
    """about: whose layout it is. prefixes: {start of a published name: the same on disk}; {"": ""} leaves names as they are.

    others: how the names of tensors begin that belong to the larger model's other parts.
    """

    about: str
    prefixes: Mapping[str, str]
    others: tuple[str, ...] = ()

    def on_disk(self, published: str) -> str:
        """The name in this layout of a tensor of the part."""
        for start, there in self.prefixes.items():
            if published.startswith(start):
                return there + published.removeprefix(start)
        raise ValueError(f"{published} begins with none of {list(self.prefixes)}; {self.about} has no place for it.")

    def published(self, on_disk: str) -> str | None:
        """The part's own name of a tensor of this layout; None if it belongs to another part.

        Raises:
            ValueError: it belongs to no part of this layout.
        """
        if on_disk.startswith(self.others):
            return None
        for start, there in self.prefixes.items():
            if on_disk.startswith(there):
                return start + on_disk.removeprefix(there)
        ours, others = sorted(set(self.prefixes.values())), sorted(self.others)
        raise ValueError(
            f"{on_disk} is no tensor of a {self.about} checkpoint: its names begin with {ours} or {others}."
        )


def recognise(found: Collection[str], layouts: Sequence[Layout], sign: str, what: str) -> Layout:
    """The one layout that these names on disk have.

    Args:
        found: names of all tensors of the checkpoint.
        sign: published name of a tensor that every checkpoint of the part has.
        what: the part and where it was looked for, "an LLM in checkpoints/x".

    Raises:
        ValueError: no layout fits, or several; the message says how each would begin and what there is instead.
    """
    there = set(found)
    fitting = [layout for layout in layouts if layout.on_disk(sign) in there]
    if len(fitting) == 1:
        return fitting[0]
    known = "".join(f"\n  {layout.about}: {layout.on_disk(sign)}" for layout in layouts)
    if fitting:
        raise ValueError(
            f"{what} is there {len(fitting)} times, as {[layout.about for layout in fitting]}; keep one. It is known by:{known}"
        )
    kinds = collapse(sorted(there))
    more = f"\n  ... and {len(kinds) - _LINES} more" if len(kinds) > _LINES else ""
    listed = "".join(f"\n  {kind}" for kind in kinds[:_LINES]) + more
    raise ValueError(
        f"{what} is not there. It is known by:{known}\nbut the {len(there)} tensors are:{listed or ' none'}"
    )


def places(found: Collection[str], layouts: Sequence[Layout], sign: str, what: str) -> dict[str, str]:
    """{published name: name on disk} of every tensor of the part, those of other parts left out.

    Raises:
        ValueError: as `recognise` and `Layout.published` do.
    """
    layout = recognise(found, layouts, sign, what)
    named = {name: layout.published(name) for name in found}
    return {published: name for name, published in named.items() if published is not None}

"""One global batch on its way from the host to the mesh: a NamedTuple, so a pytree, so grain and jit carry it as it is."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy on the host, jax on the device; jaxtyping does not look into a NamedTuple


class Batch(NamedTuple):
    """What a step reads. A field that a run does not use is None and costs nothing.

    tokens_BS: int32 text ids; at image positions the tokenizer's image id.
    is_image_BS: bool, exactly Q True per row that has an image; their running count indexes the Q visual tokens.
    supervised_BS: bool, True where this token is a target (answers and their end mark). Not shifted.
    valid_BS: bool, False on padding.
    segment_BS: int32, which turn a position belongs to, 0 for what all turns share (begin mark and image). Given, a turn
        sees segment 0 and itself, and its positions go on from segment 0; None means one conversation.
    instruction_BT: int32 ids of the user's questions alone, -1 after their end: what conditions a compressor, never an
        answer. A row of -1 is the null text; None where no compressor asks for it.
    index_B: int32 position of the sample in its source; feature caches and pictures find the image by it.
    images_BYX3: float32 normalised pixels; None when the tower's features are cached. For a tower that reads images of any
        shape (Pixels.geometry "naflex") Y is the patches, zero behind an image's own, and X the pixels of one, row by row.
    features_BNC: float32 tower tokens from the cache; None when images are given.
    patch_labels_BNL: int32 dense labels per patch (one column per kind of label); only for training a tower.
    grids_B2: int32 rows and columns of each image's own patches, for such a tower; also beside cached features.
    """

    tokens_BS: Array = None
    is_image_BS: Array = None
    supervised_BS: Array = None
    valid_BS: Array = None
    segment_BS: Array = None
    instruction_BT: Array = None
    index_B: Array = None
    images_BYX3: Array = None
    features_BNC: Array = None
    patch_labels_BNL: Array = None
    grids_B2: Array = None

"""One global batch on its way from the host to the mesh: a NamedTuple, so a pytree, so grain and jit carry it as it is."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy on the host, jax on the device; jaxtyping does not look into a NamedTuple


class Batch(NamedTuple):
    """What a step reads. A field that a run does not use is None and costs nothing.

    The leading axis is rows, or, where it says so, images: R per row, row after row (rows * R). A slot without an image
    holds zeros, an `index_B` of -1 and a null instruction; no position refers to it.

    tokens_BS: int32 text ids; at image positions some id of the tokenizer, is_image_BS alone says which those are.
    is_image_BS: bool, Q True for every image of the row; their running count indexes the row's R * Q visual tokens.
    supervised_BS: bool, True where this token is a target (answers and their end mark). Not shifted.
    valid_BS: bool, False on padding.
    segment_BS: int32, which part of the row a position belongs to, 0 for what all parts share. Given, a part sees
        segment 0 and itself, and its positions go on from segment 0; None means one conversation. Parts are the turns of a
        conversation (begin mark and image are shared), or whole samples packed into a row (nothing is shared).
    instruction_BT: of every image: int32 ids of the user's questions alone, -1 after their end: what conditions a
        compressor, never an answer. A row of -1 is the null text; None where no compressor asks for it.
    index_B: of every image: int32 position of the record in its source, so that what is drawn per image is the same in
        every epoch; for a record's image number j > 0, j times the source's records are added.
    images_BYX3: uint8 pixels, which the tower normalises, or float32 that are already; None when the tower's features are
        cached. For a tower that reads images of any shape (Pixels.geometry "naflex") Y is the patches, zero behind an
        image's own, and X the pixels of one, row by row.
    grids_B2: of every image: int32 rows and columns of its own patches, for such a tower; also beside cached features.
    features_BNC: of every image: float32 tower tokens from the cache; None when images are given.
    patch_labels_BNL: of every image: int32 dense labels per patch (one column per kind of label); for training a tower.
    """

    tokens_BS: Array = None
    is_image_BS: Array = None
    supervised_BS: Array = None
    valid_BS: Array = None
    segment_BS: Array = None
    instruction_BT: Array = None
    index_B: Array = None
    images_BYX3: Array = None
    grids_B2: Array = None
    features_BNC: Array = None
    patch_labels_BNL: Array = None


OF_ROWS = ("tokens_BS", "is_image_BS", "supervised_BS", "valid_BS", "segment_BS")

"""A prepared TFDS dataset as random access: split "train[:4000]" of a folder -> record i, without TensorFlow.

What a dataset of ours has, by name: `image` (encoded bytes), `image_id`, `turns` (a sequence of question and answer, and
where scores are wanted task and chance). Integer grids named `*_cells`, where a dataset has them, are dense labels.

TFDS's own `coco_captions` (`image`, `image/id`, `captions`) is read, too: an image is a record, each of its captions a turn
with an empty question. So one epoch shows each image once; `DataConfig.turns=1` draws one of its five captions each time, as
captioners are trained, and `independent_turns` shows all five, each as if alone. Without either, later captions would
see the earlier ones.

Opening checks that every shard is there and holds the records dataset_info.json promises; only footers are read.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  # compiled

from tcjax.config import Source
from tcjax.pipeline.prepare import PREPARED
from tcjax.pipeline.sample import BrokenShard, Record, Turn

__all__ = ["BrokenShard", "Prepared", "open_prepared"]


class Prepared:
    """Random access to one split; `len()` is the number of records. name: of dataset, config and version."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        builder: Any = tfds.builder_from_directory(str(folder))  # TFDS's decorators hide signatures from type checkers
        self.name: str = builder.info.full_name
        written = builder.info.file_format
        if written and written.value != "array_record":
            raise ValueError(
                f"{folder} was prepared as {written.value}, which only TensorFlow reads; prepare it again with "
                f"`tfds build --file_format=array_record`."
            )
        given = set(builder.info.features)
        self._captions = {"image/id", "captions"} <= given
        if not self._captions and not {"image_id", "turns"} <= given:
            raise ValueError(
                f"{folder} has the features {sorted(given)}; a dataset needs image, image_id and turns, or "
                f"coco_captions' image, image/id and captions."
            )
        known = builder.info.splits
        try:
            shards = known[split].file_instructions
        except Exception as error:  # TFDS raises ValueError, AssertionError and its own for what is a typo
            raise ValueError(
                f"{split!r} is not a split of {folder}; it has {sorted(known)}, and slices such as 'train[:100]'."
            ) from error
        if not shards:
            raise ValueError(f"{split!r} of {folder} is empty.")
        for shard in shards:
            _check_shard(Path(shard.filename), shard.examples_in_shard)
        self._shards = shards
        decoders: Any = {"image": tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(split=split, decoders=decoders)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            fields = dict(self._records[index])
        except RuntimeError as error:  # the reader's checksum of the chunk
            raise BrokenShard(
                f"record {index} of {self.split!r} is damaged in {self._shard_of(index)}: {error}"
            ) from error
        if self._captions:
            said = fields.pop("captions")
            turns = [Turn("", text.decode().strip()) for text in said["text"]]
            fields["caption_ids"] = [int(number) for number in said["id"]]
            return Record((fields.pop("image"),), str(fields.pop("image/id")), turns, fields)
        image, image_id, turns = fields.pop("image"), fields.pop("image_id").decode(), fields.pop("turns")
        text = zip(turns["question"], turns["answer"], strict=True)
        fields |= {name: values for name, values in turns.items() if name not in ("question", "answer")}
        return Record(
            (image,), image_id, [Turn(question.decode(), answer.decode()) for question, answer in text], fields
        )

    def _shard_of(self, index: int) -> Path:
        for shard in self._shards:
            if index < shard.take:
                return Path(shard.filename)
            index -= shard.take
        raise AssertionError(index)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The dense labels this dataset has."""
        return tuple(name for name in self[0].fields if name.endswith("_cells"))


def open_prepared(root: Path, source: Source) -> Prepared:
    """The prepared shards of a source.

    Raises:
        ValueError: not prepared yet, or no such split.
        BrokenShard: a shard is missing or cut short.
    """
    place = root / source.path / PREPARED
    if not place.is_dir() and (root / source.path).is_dir():
        place = root / source.path  # a TFDS data_dir, or a folder in it
    found = sorted(path.parent for path in place.rglob("dataset_info.json") if "incomplete." not in str(path))
    if not found:
        raise ValueError(
            f"{root / source.path / PREPARED} holds no prepared dataset; run: tcjax data prepare {source.path}"
        )
    if len(found) > 1:
        raise ValueError(
            f"{place} holds several prepared datasets: {[str(path) for path in found]}; remove all but one."
        )
    return Prepared(found[0], source.split)


def _check_shard(path: Path, promised: int) -> None:
    remedy = "remove the prepared folder and run `tcjax data prepare` again."
    if not path.is_file():
        raise BrokenShard(f"shard {path} is missing; {remedy}")
    reader = array_record_module.ArrayRecordReader(str(path))
    held = reader.num_records()  # 0, without complaint, of a file that lost its footer
    with contextlib.suppress(RuntimeError):  # complains of the same, but only now and not always
        reader.close()
    if held != promised:
        raise BrokenShard(
            f"shard {path} is damaged: {promised} records promised, {held} readable in {path.stat().st_size} bytes; "
            f"{remedy}"
        )

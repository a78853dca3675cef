"""Any source -> a folder of stored records (readers/stored.py): `tcjax data prepare SOURCE --out DIR`.

    store(records, DIR)    DIR.preparing/00000-of-00012.array_record, .json beside each   ->   DIR/ with records.json

Every shard is written aside and renamed when it is whole, its facts (records, bytes, SHA-256) after it; the same command
goes on after the last whole shard. When all are there the folder gets its manifest and its name: DIR is whole or not there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  # compiled

from tcjax.pipeline.in_order import in_order
from tcjax.pipeline.readers.stored import MANIFEST, VERSION, pack
from tcjax.pipeline.sample import BadSample, Record, Records
from tcjax.record import file_hash, write_json

SHARD = 4096  # records; of LLaVA's pretraining images some 100 MB

_PLAN = "plan.json"


def store(
    records: Records,
    out: Path,
    *,
    source: dict[str, Any],
    shard: int = SHARD,
    leave_out: bool = False,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes every record of a source to `out`.

    Args:
        source: what the records were made of, as JSON types; kept in the manifest. Other facts are another folder.
        shard: records per file.
        leave_out: a `BadSample` is left out and named in the manifest; otherwise it stops the preparation.

    Returns:
        `out`. It is not written again if it is whole and made of the same.
    """
    plan = {
        "version": VERSION,
        "name": records.name,
        "split": records.split,
        "label_names": list(records.label_names),
        "source": source,
        "rows": len(records),
        "shard": shard,
        "leave_out": leave_out,
    }
    if shard < 1:
        raise ValueError(f"{shard} records per shard: takes a whole number from 1 up.")
    if out.exists():
        return _same(out, plan)
    beside = out.with_name(out.name + ".preparing")
    _begin(beside, plan)
    num, facts = -(-len(records) // shard), []
    for number in range(num):
        rows = range(number * shard, min((number + 1) * shard, len(records)))
        facts.append(
            _write(records, beside / f"{number:05d}-of-{num:05d}.array_record", rows, leave_out, threads, progress)
        )
    shards = [fact for fact in facts if fact["records"]]
    if not shards:
        raise ValueError(f"none of the {len(records)} rows of {records.folder} is a sample; run `tcjax data verify`.")
    left_out = [reason for fact in facts for reason in fact.pop("left_out")]
    manifest = plan | {"records": sum(fact["records"] for fact in shards), "left_out": left_out, "shards": shards}
    for fact in facts:
        (beside / fact["file"]).with_suffix(".json").unlink()
    (beside / _PLAN).unlink()
    write_json(beside / MANIFEST, manifest)
    beside.rename(out)
    return out


def _begin(beside: Path, plan: dict[str, Any]) -> None:
    if (beside / MANIFEST).is_file():  # all but the renaming was done, or something else has that name
        shutil.rmtree(beside)
    if beside.exists():
        path = beside / _PLAN
        if not path.is_file() and any(beside.iterdir()):
            raise ValueError(f"{beside} is in the way and no preparation of ours; remove it.")
        if not path.is_file() or json.loads(path.read_text()) != plan:
            shutil.rmtree(beside)  # begun from other data
    write_json(beside / _PLAN, plan)


def _same(out: Path, plan: dict[str, Any]) -> Path:
    path = out / MANIFEST
    held = json.loads(path.read_text()) if path.is_file() else {}
    if {key: held.get(key) for key in plan} != plan:
        raise ValueError(f"{out} is there already and holds something else; remove it, or choose another --out.")
    return out


def _write(
    records: Records,
    path: Path,
    rows: range,
    leave_out: bool,
    threads: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """One shard and the facts of it; at once if it is there already."""
    about = path.with_suffix(".json")
    if about.is_file():
        fact = json.loads(about.read_text())
        if (path.stat().st_size if path.is_file() else 0) == fact["bytes"]:
            progress(rows.stop, len(records))
            return fact

    def read(index: int) -> Record | BadSample:
        try:
            return records[index]
        except BadSample as error:
            if leave_out:
                return error
            raise

    writing, held, left_out = path.with_suffix(".writing"), 0, []
    writer = array_record_module.ArrayRecordWriter(str(writing), "group_size:1,uncompressed")
    try:
        for done, found in enumerate(in_order(read, rows, threads), rows.start + 1):
            if isinstance(found, BadSample):
                left_out.append(str(found))
            else:
                writer.write(pack(found))
                held += 1
            progress(done, len(records))
    finally:
        writer.close()
    if held:
        writing.replace(path)
    else:
        writing.unlink()
    size, digest = (path.stat().st_size, file_hash(path)) if held else (0, "")
    fact = {"file": path.name, "records": held, "bytes": size, "sha256": digest, "left_out": left_out}
    write_json(about, fact)
    return fact

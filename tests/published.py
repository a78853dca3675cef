"""Ten rows in every published schema, exactly as the files have them, with tiny images."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = ("red", "blue", "4 7 1 9", "3", "yes")


def image(i: int, kind: str = "JPEG", size_YX: tuple[int, int] = (6, 8)) -> bytes:
    """An encoded image of random pixels, another one for every i."""
    pixels_YX3 = np.random.default_rng(i).integers(0, 256, (*size_YX, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels_YX3).save(out, kind)
    return out.getvalue()


def said(i: int, *, marks: int = 1, turns: int = 1) -> list[dict]:
    """`conversations` of `turns` questions, the first with its marks before or after a newline, as in the 558k captions."""
    found = []
    for turn in range(turns):
        question = f"colour of {(i + turn) % 10} ?"
        if turn == 0 and marks:
            mark = "\n".join(["<image>"] * marks)
            question = f"{mark}\n{question}" if i % 2 else f"{question}\n{mark}"
        found.append({"from": "human", "value": question})
        found.append({"from": "gpt", "value": WORDS[(i + turn) % len(WORDS)]})
    return found


def pretrain_rows(num: int = 10) -> list[dict]:
    """blip_laion_cc_sbu_558k.json: id, image, conversations, and nothing else."""
    return [{"id": f"{i:09d}", "image": f"{i % 3:05d}/{i:09d}.jpg", "conversations": said(i)} for i in range(num)]


def mix_rows() -> list[dict]:
    """llava_v1_5_mix665k.json: several turns; rows of text alone have `model` and no `image`; two ids may be the same."""
    places = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")
    rows = []
    for i in range(10):
        if i % 4 == 3:
            rows.append({"id": f"text{i}", "model": "", "conversations": said(i, marks=0, turns=3)})
        else:
            path = f"{places[i % len(places)]}/{i:012d}.jpg"
            rows.append({"id": f"{i:012d}", "image": path, "conversations": said(i, turns=1 + i % 3)})
    return rows


def write_images(folder: Path, rows: list[dict]) -> None:
    """The image files that rows name, image i for row i (i * 100 + number where there are several)."""
    for i, row in enumerate(rows):
        paths = row.get("image", [])
        for number, path in enumerate([paths] if isinstance(paths, str) else paths):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(image(i if isinstance(paths, str) else i * 100 + number))


def write_json(folder: Path, rows: list[dict], name: str = "data.json", **options) -> Path:
    """A JSON list, or JSON lines by the name's suffix, with the images it names beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_images(folder, rows)
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, **options), encoding="utf-8")
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A plain tar with these files in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def tar_of(rows: list[dict], folder: Path) -> list[tuple[str, bytes]]:
    """The members of a web-dataset with these rows of conversations."""
    members = []
    for row in rows:
        if "image" in row:
            members.append((f"{row['id']}.jpg", (folder / row["image"]).read_bytes()))
        rest = {key: value for key, value in row.items() if key != "image"}
        members.append((f"{row['id']}.json", json.dumps(rest).encode()))
    return members


def fine_vision_rows(num: int = 10) -> list[dict]:
    """FineVision's columns; row i has i % 3 images, 1 + i % 2 texts, and ratings of 1 to 5 per text."""
    rows = []
    for i in range(num):
        texts = [
            {"user": f"colour of {(i + t) % 10} ?", "assistant": WORDS[(i + t) % len(WORDS)]} for t in range(1 + i % 2)
        ]
        images = [{"bytes": image(i * 10 + n, "PNG"), "path": f"{i}-{n}.png"} for n in range(i % 3)]
        row = {"images": images, "texts": texts, "source": "chartqa"}
        for column in ("relevance", "image_correspondence", "visual_dependency", "formatting"):
            ratings = [1 + (i + t) % 5 if column == "relevance" else 5 for t in range(len(texts))]
            row |= {f"{column}_ratings": ratings, f"{column}_min": min(ratings)}
        rows.append(row)
    return rows


def write_parquet(path: Path, rows: list[dict], group: int = 3) -> Path:
    """Rows with the Hub's types, `group` of them per row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {"images": pa.list_(picture), "image": picture}
    table = pa.table({
        name: pa.array([row.get(name) for row in rows], types.get(name)) for name in rows[0]
    })  # fmt: skip
    pq.write_table(table, path, row_group_size=group)
    return path

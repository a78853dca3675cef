"""JPEG files -> batches of normalised pixels on the device: our input against torch's DataLoader with the Hugging Face
image processor, on the same files and the same cores.

    python -m benchmarks.host                               256 made pictures of COCO's sizes, CLIP's 336 pixels
    python -m benchmarks.host --images FOLDER --cores 1,2,4

Ours is the whole input of a training: LLaVA's JSON, conversation and all, `make_input` with one thread per core, and the
tower's normalisation compiled for this CPU (an accelerator does it for nothing). Theirs is pictures alone, with one worker
process per core and with none, of which the faster counts. Both are held to the same cores, take turns, and are warm; the
median of the turns is kept. Beside the rates stand milliseconds of processor time per image, ours against the loader without
workers: these say the same on a machine that others use too. Their processor is the torchvision ("fast") one where
torchvision is installed, else PIL's. Pixels are compared before anything is timed. Prints a table; writes it as Markdown and
as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image

from benchmarks.compressors import markdown, show
from tcjax.config import DataConfig, Pixels, Source
from tcjax.nn.pixels import normalised
from tcjax.pipeline.input import make_input
from tcjax.preprocessor import from_preprocessor
from tcjax.record import write_json
from tcjax.train.log import environment

ROOT = Path(__file__).parents[1]
SIZES = [(480, 640), (640, 480), (427, 640), (375, 500), (640, 427), (480, 640)]  # the commonest of COCO
PROCESSORS = {
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}),
    "siglip": ("SiglipImageProcessor", {"size": {"height": 384, "width": 384}}),
}


def make_pictures(folder: Path, num: int, scale: float = 1.0) -> list[Path]:
    """JPEGs of quality 92 whose amplitudes fall with frequency as photographs' do: about 150 KB at 480 x 640."""
    folder.mkdir(parents=True)
    random, paths = np.random.default_rng(0), []
    for i in range(num):
        Y, X = (int(side * scale) for side in SIZES[i % len(SIZES)])
        noise = np.fft.rfft2(random.standard_normal((3, Y, X)), axes=(1, 2))
        frequency = np.hypot(np.fft.fftfreq(Y)[:, None], np.fft.rfftfreq(X)[None])
        frequency[0, 0] = 1
        image = np.fft.irfft2(noise / frequency**1.2, s=(Y, X), axes=(1, 2))
        image = 120 + 50 * (image - image.mean()) / image.std()
        paths.append(folder / f"{i:05}.jpg")
        Image.fromarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(paths[-1], quality=92)
    return paths


def load_processor(name: str) -> tuple[Any, str]:
    """The Hugging Face processor and its backend."""
    published, settings = PROCESSORS[name]
    try:
        _with_operators()
        import torchvision

        backend = f"torchvision {torchvision.__version__}"
    except ImportError:
        backend = "PIL"
    import transformers

    return getattr(transformers, published + ("" if backend != "PIL" else "Pil"))(**settings), backend


def _with_operators() -> None:
    """A CUDA build of torchvision beside a CPU build of torch lacks its compiled operators, and its import wants their names;
    no processor calls them."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[Any] = []  # a library's definitions live as long as it does


class Pictures(torch.utils.data.Dataset):
    """What people write: open, process."""

    def __init__(self, paths: list[Path], name: str):
        self.paths, self.name, self.processor = paths, name, None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.processor is None:  # made where it is used: a worker starts from nothing
            torch.set_num_threads(1)
            self.processor, _ = load_processor(self.name)
        with Image.open(self.paths[index]) as image:
            return self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def torch_batches(paths: list[Path], name: str, *, batch: int, workers: int) -> Any:
    """An endless iterator of pixel_values."""
    sampler = torch.utils.data.RandomSampler(paths, replacement=True, num_samples=10**9)
    return iter(
        torch.utils.data.DataLoader(
            Pictures(paths, name),
            batch_size=batch,
            num_workers=workers,
            sampler=sampler,
            multiprocessing_context="spawn" if workers else None,
        )
    )


def rate_of(batches: Any, take: Callable[[Any], Any], *, batch: int, count: int, warm: int) -> tuple[float, float]:
    """Images per second, and milliseconds of this process's processor time per image, after `warm` batches."""
    for _ in range(warm):
        take(next(batches))
    started, used = time.perf_counter(), time.process_time()
    for _ in range(count // batch):
        take(next(batches))
    images = count // batch * batch
    return images / (time.perf_counter() - started), 1e3 * (time.process_time() - used) / images


def our_input(folder: Path, paths: list[Path], pixels: Pixels, *, batch: int, threads: int) -> Any:
    """The real input over a LLaVA JSON of these pictures."""
    talk = [{"from": "human", "value": "<image>\ncolour of 7 ?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": path.stem, "image": path.name, "conversations": talk} for path in paths]
    (folder / "rows.json").write_text(json.dumps(rows))
    data = DataConfig(
        sources=(Source(path=str(folder / "rows.json"), format="llava", images=str(paths[0].parent)),),
        tokenizer=str(ROOT / "configs/boards_base/tokenizer.json"),
        batch=batch,
        text_length=32,
        threads=threads,
    )
    return make_input(data, pixels, 4, root=folder)


def compare(paths: list[Path], name: str, pixels: Pixels, batches: Any, place: Any) -> dict[str, float]:
    """Levels of 255 between both, over one batch: the largest, and the share of values that differ at all."""
    batch = next(batches)
    ours = np.asarray(place(batch.images_BYX3))
    pictures = Pictures(paths, name)
    theirs = np.stack([pictures[index].numpy() for index in batch.index_B]).transpose(0, 2, 3, 1)
    off = np.rint(np.abs(ours - theirs) * 255 * np.array(pixels.std))
    return {"largest": float(off.max()), "share": float((off > 0).mean())}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=None, help="a folder of JPEGs; pictures are made otherwise")
    parser.add_argument("--made", type=int, default=256, help="pictures to make")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sides of made pictures")
    parser.add_argument("--processor", choices=sorted(PROCESSORS), default="clip")
    parser.add_argument("--cores", default="1,2")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--count", type=int, default=512, help="images timed in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--no-workers", dest="workers", action="store_false", help="leave worker processes out")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/benchmarks/host.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    all_cores = sorted(os.sched_getaffinity(0))
    wanted = [int(cores) for cores in arguments.cores.split(",")]
    if max(wanted) > len(all_cores):
        parser.error(f"--cores {arguments.cores}: this machine lends {len(all_cores)}.")
    published, settings = PROCESSORS[arguments.processor]
    pixels = from_preprocessor({"image_processor_type": published, **settings})
    _, backend = load_processor(arguments.processor)
    place = jax.jit(lambda images_BYX3: normalised(images_BYX3, pixels, jnp.float32))
    facts = environment(ROOT) | {"torch": torch.__version__, "processor": f"{published}, {backend}"}
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        paths = sorted(arguments.images.glob("*.jp*g")) if arguments.images else []
        paths = paths or make_pictures(folder / "pictures", arguments.made, arguments.scale)
        options = {"batch": arguments.batch}
        facts |= {
            "files": len(paths),
            "kilobytes": round(sum(path.stat().st_size for path in paths) / len(paths) / 1e3, 1),
        }
        shown = our_input(folder, paths, pixels, threads=0, **options)
        facts["difference"] = compare(paths, arguments.processor, pixels, shown, place)
        assert facts["difference"]["largest"] <= 2 and facts["difference"]["share"] < 0.05, facts["difference"]
        for cores in wanted:
            os.sched_setaffinity(0, all_cores[:cores])
            taken: dict[str, list[tuple[float, float]]] = {"ours": [], "no worker": []}
            taken |= {"workers": []} if arguments.workers else {}
            for _ in range(arguments.turns):
                # A new iterator each turn: nothing of one side runs while the other is timed.
                timed = options | {"count": arguments.count, "warm": 2 * cores + 2}
                ours = our_input(folder, paths, pixels, threads=cores, **options)
                taken["ours"].append(rate_of(ours, lambda b: jax.block_until_ready(place(b.images_BYX3)), **timed))
                del ours
                for name, workers in {"no worker": 0, "workers": cores}.items():
                    if name not in taken:
                        continue
                    theirs = torch_batches(paths, arguments.processor, workers=workers, **options)
                    taken[name].append(rate_of(theirs, lambda pixels: pixels, **timed))
                    del theirs
            os.sched_setaffinity(0, all_cores)
            rate = {name: round(median(rate for rate, _ in turns) / cores, 1) for name, turns in taken.items()}
            spent = {name: round(median(ms for _, ms in taken[name]), 2) for name in ("ours", "no worker")}
            rows[str(cores)] = rate | {
                "ratio": round(rate["ours"] / max(rate["no worker"], rate.get("workers", 0.0)), 2),
                "milliseconds": spent,
                "milliseconds_ratio": round(spent["no worker"] / spent["ours"], 2),
            }
            print(cores, json.dumps(rows[str(cores)]), flush=True)
            write_json(arguments.out, {"environment": facts, "rows": rows})
    lines = [
        ["cores", "ours", "DataLoader", "with a worker per core", "ratio", "ms, ours", "ms, DataLoader", "ratio of ms"]
    ]
    for cores, row in rows.items():
        rates, spent = (
            [f"{row[name]:.1f}" if name in row else "-" for name in ("ours", "no worker", "workers")],
            row["milliseconds"],
        )
        times = [f"{spent[name]:.2f}" for name in ("ours", "no worker")]
        lines.append([cores, *rates, f"{row['ratio']:.2f}", *times, f"{row['milliseconds_ratio']:.2f}"])
    title = (
        f"Images per second and core; {facts['processor']}, {facts['kilobytes']} KB a file, batch {arguments.batch}, "
        f"{facts['hardware']}, commit {facts['commit']}"
    )
    show(lines, title)
    arguments.out.with_suffix(".md").write_text(markdown(lines, title))
    print(arguments.out)


if __name__ == "__main__":
    main()

"""A project folder with a small prepared digit_boards dataset, made by the real builder, and a user's own dataset."""

from pathlib import Path

from data.digit_boards import vocabulary
from tcjax.config import DataConfig, Pixels, Source
from tcjax.pipeline import prepare

FOLDER = Path(__file__).parents[1] / "data/digit_boards"
PIXELS = Pixels(size_YX=(64, 64))
SOURCE = Source(path="data/digit_boards")


def make_project(root: Path, *, train: int = 24, validation: int = 2, test: int = 12) -> Path:
    """Prepares the dataset below `root`, writes its tokenizer beside it, and returns `root`."""
    config = prepare.load_builder(FOLDER).Config(name="tiny", train=train, validation=validation, test=test)
    prepare.prepare(FOLDER, config=config, into=root / SOURCE.path / prepare.PREPARED)
    vocabulary.tokenizer().save(str(root / "tokenizer.json"))
    return root


def data_config(**changes) -> DataConfig:
    """Batches of 4, read in the caller's thread."""
    return DataConfig(**{"sources": (SOURCE,), "tokenizer": "tokenizer.json", "batch": 4, "threads": 0, **changes})


# A user's own dataset: other sizes than the tower's, no tasks, no labels; image i is unreadable if i % 40 == 3.
OWN_BUILDER = """
import io
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(), "image_id": tfds.features.Text()}
        features["turns"] = tfds.features.Sequence({"question": tfds.features.Text(), "answer": tfds.features.Text()})
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(120):
            png = io.BytesIO()
            Image.fromarray(np.full((6, 8, 3), i, np.uint8)).save(png, "PNG")
            turn = {"question": "count red ?", "answer": "purple" if i == 7 else str(i % 5)}
            image = png.getvalue()[:20] if i % 40 == 3 else png.getvalue()
            yield i, {"image": image, "image_id": f"own-{min(i, 118)}", "turns": [turn]}
"""


def make_own(root: Path) -> Path:
    """Prepares the user's own dataset in `root/own`, and returns `root`."""
    (root / "own").mkdir()
    (root / "own/own_dataset_builder.py").write_text(OWN_BUILDER)
    prepare.prepare(root / "own")
    return root

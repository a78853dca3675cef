"""A dataset folder (builder + README) -> its prepared shards in `folder/prepared`, by TFDS without TensorFlow.

    prepare(folder)    folder/<name>_dataset_builder.py  ->  folder/prepared/<name>/<version>/*.array_record

The builder is any `tfds.core.DatasetBuilder` named Builder that hands over encoded image bytes. TFDS writes to a
temporary folder and renames it when complete, so a preparation that was cut short leaves nothing half done, and one
that is complete is not repeated.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from etils import epath
from tensorflow_datasets.core.registered import skip_registration

PREPARED = "prepared"


def prepare(folder: Path, *, config: object = None, into: Path | None = None) -> Path:
    """Runs the folder's builder unless its output is there already; shows TFDS's progress bars.

    Args:
        folder: holds exactly one `*_dataset_builder.py` with a class `Builder`.
        config: name or instance of a TFDS BuilderConfig; None takes the builder's first.
        into: where the shards go; `folder/prepared` if None.

    Returns:
        The folder with the shards and dataset_info.json.
    """
    place = str(into or folder / PREPARED)
    builder = load_builder(folder).Builder(data_dir=place, config=config, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def load_builder(folder: Path) -> ModuleType:
    """The builder's module, imported by path as part of a package, so that it may import its neighbours relatively."""
    found = sorted(Path(folder).glob("*_dataset_builder.py"))
    if len(found) != 1:
        raise ValueError(
            f"{folder} must hold exactly one *_dataset_builder.py, found {[path.name for path in found]}; "
            f"name a dataset folder such as data/digit_boards."
        )
    package, start = f"tcjax_dataset_{found[0].stem}", Path(folder).resolve() / "__init__.py"
    spec = importlib.util.spec_from_file_location(package, start, submodule_search_locations=[str(start.parent)])
    assert spec is not None
    assert spec.loader is not None
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]  # another folder's builder of the same name
    sys.modules[package] = importlib.util.module_from_spec(spec)
    if start.exists():  # a dataset folder need not be a package on disk
        spec.loader.exec_module(sys.modules[package])
    with skip_registration():
        module = importlib.import_module(f"{package}.{found[0].stem}")
    # TFDS 4.9.10 looks this up through importlib_resources, which it does not declare.
    module.Builder.code_path = epath.Path(found[0])
    return module

"""What `tcjax import` does not take: it lists what does not fit, asks for what is missing, and lights no bombs."""

import io
import json
import pickle
import re
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from tcjax.cli import main
from tcjax.compressors import mlp
from tcjax.export.checkpoints import open_checkpoint
from tcjax.export.torch.formats import pickled
from tcjax.export.warm_start import import_artifact
from tcjax.interop.mismatch import WeightMismatch
from tests.test_import import LLAVA, drawn, flamingo


def test_every_tensor_that_does_not_fit_is_in_one_error(tmp_path):
    weights = drawn(LLAVA, "model.mm_projector.")
    del weights["model.mm_projector.2.bias"]
    weights["model.mm_projector.4.norm"] = torch.ones(12)
    weights["model.mm_projector.0.bias"] = torch.ones(11)
    save_file(weights, tmp_path / "mm.safetensors")
    with pytest.raises(WeightMismatch) as caught:
        import_artifact(tmp_path / "mm.safetensors", tmp_path / "out", grid_HW=(4, 4))
    said = str(caught.value)
    assert re.search(
        r"(?s)MISSING \(1\)\n    2.bias.*UNEXPECTED \(1\)\n    4.norm.*SHAPE \(1\)\n    0.bias: \[11\] there", said
    )
    assert not (tmp_path / "out").exists()


def test_an_unknown_layout_lists_those_that_are_known(tmp_path):
    save_file({"some.weight": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"(?s)holds no connector that is known \(some.weight, ...\).*LLaVA \(mlp\)"):
        import_artifact(tmp_path / "x.safetensors", tmp_path / "out")


def test_several_layouts_in_one_file_need_a_word(tmp_path):
    both = drawn(LLAVA, "model.mm_projector.") | flamingo("perceiver.")
    save_file(both, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"several layouts: LLaVA \(mlp\), OpenFlamingo \(resampler\); --family"):
        import_artifact(tmp_path / "x.safetensors", tmp_path / "out", grid_HW=(4, 4))
    found = import_artifact(tmp_path / "x.safetensors", tmp_path / "out", grid_HW=(4, 4), family="mlp")
    assert found.config == mlp.Config()
    with pytest.raises(ValueError, match=r"'pixel'.* has no published layout; choose one of"):
        import_artifact(tmp_path / "x.safetensors", tmp_path / "out", family="pixel")
    with pytest.raises(ValueError, match="is not of qformer but of mlp, resampler"):
        import_artifact(tmp_path / "x.safetensors", tmp_path / "out", family="qformer")


def test_a_missing_fact_is_asked_for(tmp_path):
    save_file(drawn(LLAVA, "model.mm_projector."), tmp_path / "mm.safetensors")
    with pytest.raises(ValueError, match="does not say the tower's token grid; give it: --grid 24x24"):
        import_artifact(tmp_path / "mm.safetensors", tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps({"projector_hidden_act": "silu"}))
    with pytest.raises(ValueError, match="projector_hidden_act='silu'; only 'gelu'"):
        import_artifact(tmp_path / "mm.safetensors", tmp_path / "out", grid_HW=(4, 4))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nowhere", None, "does not exist"),
        ("model.safetensors", b"\xff" * 40, "no whole safetensors file"),
        ("model.bin", b"not a torch file", "neither a zip nor a pickle"),
        ("model.pt", b"PK\x03\x04 cut short", "neither a zip nor a pickle"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        import_artifact(tmp_path / name, tmp_path / "out")
    folder = tmp_path / "shards"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"holds neither \*.safetensors"):
        import_artifact(folder, tmp_path / "out")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ValueError, match=r"lists \['gone.safetensors'\], which are not there"):
        import_artifact(folder, tmp_path / "out")


class Bomb:
    """Unpickled, it would leave a file."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_not_loaded(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    if zipped:
        torch.save({"model.mm_projector.0.weight": torch.ones(2, 2), "x": Bomb()}, tmp_path / "mm.bin")
    else:
        (tmp_path / "mm.bin").write_bytes(pickle.dumps({"x": Bomb()}, protocol=2))
    with pytest.raises(ValueError, match="holds more than tensors, and loading it could run code"):
        pickled.load(tmp_path / "mm.bin")
    assert not (tmp_path / "exploded").exists()


def test_a_zip_that_unpacks_to_more_than_it_is_is_not_opened(tmp_path):
    whole = io.BytesIO()
    torch.save({"model.mm_projector.0.weight": torch.zeros(1 << 18)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "mm.bin", "w", zipfile.ZIP_DEFLATED) as squeezed:
        for entry in source.infolist():
            squeezed.writestr(entry.filename, source.read(entry))
    with pytest.raises(ValueError, match="made to fill the memory"):
        pickled.load(tmp_path / "mm.bin")


def test_one_number_that_says_it_is_a_huge_tensor_is_refused(tmp_path):
    torch.save({"model.mm_projector.0.weight": torch.zeros(1).expand(1 << 40)}, tmp_path / "mm.bin")
    with pytest.raises(ValueError, match=r"declares tensors of 4,398,046,511,104"):
        pickled.load(tmp_path / "mm.bin")


def test_without_pytorch_a_pickle_says_what_is_missing(tmp_path, monkeypatch):
    torch.save(drawn(LLAVA, "model.mm_projector."), tmp_path / "mm.bin")
    monkeypatch.setitem(sys.modules, "tcjax.export.torch.formats.pickled", None)
    monkeypatch.delattr(sys.modules["tcjax.export.torch.formats"], "pickled")
    with pytest.raises(ValueError, match=r"PyTorch is not installed: pip install 'tcjax\[torch\]'"):
        import_artifact(tmp_path / "mm.bin", tmp_path / "out", grid_HW=(4, 4))


def test_only_the_shards_that_hold_the_connector_are_opened(tmp_path):
    save_file(drawn(LLAVA, "model.mm_projector."), tmp_path / "a.safetensors")
    save_file({"model.layers.0.weight": torch.ones(4)}, tmp_path / "b.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"")
    assert set(checkpoint.read(["model.mm_projector.0.bias"])) == {"model.mm_projector.0.bias"}


def test_the_cli_reports_in_one_line(tmp_path, capsys):
    assert main(["import", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tcjax import: ") and "does not exist" in error

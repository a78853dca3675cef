"""run.json reads back as the same config, and a fingerprint is as wide as what a result depends on."""

import dataclasses
import json

import pytest

from tcjax.config import DataConfig, EvaluateConfig, Pixels, Run, Source, TrainConfig
from tcjax.record import fingerprint, from_dict, to_dict, write_json


def a_run(**train) -> Run:
    return Run(
        name="study/a",
        model=Pixels(size_YX=(8, 8)),
        data=DataConfig(sources=(Source(path="data/x"),), tokenizer="words.json"),
        train=TrainConfig(steps=3, **train),
        evaluate=EvaluateConfig(source=Source(path="data/x", split="test")),
    )


def test_a_run_survives_json():
    run = a_run(weights={"compressor": "a.safetensors"})
    assert from_dict(json.loads(json.dumps(to_dict(run)))) == run


def test_an_unknown_field_is_named_beside_the_valid_ones():
    resolved = to_dict(a_run())
    resolved["train"]["stepz"] = 4
    with pytest.raises(ValueError, match=r"TrainConfig has no field 'stepz'; valid fields: \['steps'.*mean 'steps'\?"):
        from_dict(resolved)


def test_a_missing_field_is_named():
    resolved = to_dict(a_run())
    del resolved["train"]["steps"]
    with pytest.raises(ValueError, match=r"TrainConfig lacks \['steps'\]"):
        from_dict(resolved)


@pytest.mark.parametrize("path", ["os:system", "subprocess:Popen", "tcjax.record:fingerprint", "nowhere:Thing"])
def test_nothing_but_config_classes_is_ever_made(path):
    with pytest.raises(ValueError, match="not a config class"):
        from_dict({"is": path})


def test_a_config_holds_no_arrays():
    with pytest.raises(TypeError, match="not object"):
        to_dict({"x": object()})


def test_the_fingerprint_changes_with_a_field_and_with_the_bytes_of_a_named_file(tmp_path):
    (tmp_path / "words.json").write_text("a")
    before = fingerprint(a_run(), tmp_path)
    assert before == fingerprint(a_run(), tmp_path)
    assert before != fingerprint(a_run(peak_lr=2e-3), tmp_path)
    (tmp_path / "words.json").write_text("b")
    assert before != fingerprint(a_run(), tmp_path)


def test_the_fingerprint_sees_a_dataset_prepared_anew(tmp_path):
    facts = tmp_path / "data/x/prepared/x/1.0.0/dataset_info.json"
    before = fingerprint(a_run(), tmp_path)
    write_json(facts, {"shardLengths": ["20"]})
    there = fingerprint(a_run(), tmp_path)
    write_json(facts, {"shardLengths": ["21"]})
    assert len({before, there, fingerprint(a_run(), tmp_path)}) == 3


def test_the_fingerprint_sees_another_tokenizer_in_a_checkpoints_folder(tmp_path):
    run = a_run()
    run = run.replace(data=dataclasses.replace(run.data, tokenizer="llm"))
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/tokenizer.model").write_bytes(b"a")
    before = fingerprint(run, tmp_path)
    (tmp_path / "llm/tokenizer.model").write_bytes(b"b")
    assert before != fingerprint(run, tmp_path)


def test_every_field_of_every_config_is_keyword_only_and_frozen():
    for cls in (Run, DataConfig, TrainConfig, EvaluateConfig, Source, Pixels):
        assert all(field.kw_only for field in dataclasses.fields(cls))
        assert cls.__dataclass_params__.frozen

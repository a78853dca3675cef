"""The model that lmms-eval finds at tcjax's entry point answers its requests as the run itself does.

With lmms-eval installed its own registry, base class and Instance are used; without it, a stand-in of the same names and
signatures (lmms-eval 0.7.3: models/registry_v2.py, api/model.py, api/instance.py).
"""

import abc
import importlib.util
import sys
import tomllib
import types
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tcjax import lmms_plugin
from tcjax.reply import Asked, Responder
from tests import suite_files

GROUP = "lmms_eval.models"
PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


def stand_in(monkeypatch) -> None:
    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    class lmms(abc.ABC):
        is_simple = True

        def __init__(self):
            self._rank, self._world_size, self.task_dict = 0, 1, {}

        @abc.abstractmethod
        def loglikelihood(self, requests): ...

        @abc.abstractmethod
        def generate_until(self, requests): ...

        @abc.abstractmethod
        def generate_until_multi_round(self, requests): ...

    @dataclass
    class Instance:
        request_type: str
        arguments: tuple
        idx: int
        metadata: dict = field(default_factory=dict)

        @property
        def args(self):
            return self.arguments

    classes = {"models.registry_v2": ModelManifest, "api.model": lmms, "api.instance": Instance}
    for name in ("", ".models", ".api"):
        monkeypatch.setitem(sys.modules, f"lmms_eval{name}", types.ModuleType(f"lmms_eval{name}"))
    for name, cls in classes.items():
        module = types.ModuleType(f"lmms_eval.{name}")
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def lmms_eval(monkeypatch):
    lmms_plugin._model_class.cache_clear()
    if importlib.util.find_spec("lmms_eval") is None:
        stand_in(monkeypatch)
    yield
    lmms_plugin._model_class.cache_clear()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    suite_files.tiny_run(root)
    return root


def documents() -> list[dict]:
    """Two of one image, one of none."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (20, 24, 3)).astype(np.uint8)) for _ in range(2)]
    return [{"question": f"What is {i}?", "images": pictures[i : i + 1], "answer": " dog"} for i in range(3)]


@pytest.fixture
def model(lmms_eval, project):
    module, _, name = lmms_plugin.manifest().simple_class_path.rpartition(".")
    model = getattr(importlib.import_module(module), name)(pretrained=str(project / "run"), batch_size="2")
    model.task_dict = {"task": {"test": documents()}}
    return model


def requests(second) -> list:
    from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    made = []
    for i, doc in enumerate(documents()):
        arguments = (doc["question"], second(i), lambda doc: doc["images"], i, "task", "test")
        facts = {"task": "task", "doc_id": i, "repeats": 1}
        made.append(Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=facts))
    return made


def test_the_entry_point_resolves_to_a_manifest(lmms_eval):
    (name, value), *rest = PYPROJECT["project"]["entry-points"][GROUP].items()
    payload = EntryPoint(name, value, GROUP).load()
    found = payload()
    assert not rest and found.model_id == name == "tcjax"
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    assert isinstance(found, ModelManifest) and found.simple_class_path == "tcjax.lmms_plugin.Tcjax"


def test_lmms_evals_own_registry_builds_the_class_where_it_is_installed(lmms_eval):
    registry = sys.modules.get("lmms_eval.models.registry_v2") or importlib.import_module(
        "lmms_eval.models.registry_v2"
    )
    if not hasattr(registry, "ModelRegistryV2"):
        pytest.skip("lmms-eval is not installed")
    found = registry.ModelRegistryV2()
    found.register_manifest(lmms_plugin.manifest())
    assert found.get_model_class("tcjax_run").__name__ == "Tcjax"


def test_it_answers_as_the_run_does(model, project):
    run = Responder.of_folder(project / "run", root=project, batch=1)
    said = model.generate_until(requests(lambda i: {"max_new_tokens": 4 + i, "temperature": 0, "num_beams": 1}))
    for i, doc in enumerate(documents()):
        images = tuple(run.picture(lmms_plugin._encoded(image), "x") for image in doc["images"])
        assert [said[i]] == run.answers([Asked(doc["question"], images)], 4 + i)


def test_an_answer_ends_before_a_stop_string(model):
    (whole, *_) = model.generate_until(requests(lambda i: {"max_new_tokens": 6}))
    stop = whole[2]
    (cut, *_) = model.generate_until(requests(lambda i: {"max_new_tokens": 6, "until": [stop]}))
    assert cut == whole.partition(stop)[0].strip()


def test_log_likelihoods_are_the_runs(model, project):
    run = Responder.of_folder(project / "run", root=project, batch=1)
    found = model.loglikelihood(requests(lambda i: " dog" if i else lambda doc: doc["answer"]))
    for i, doc in enumerate(documents()):
        images = tuple(run.picture(lmms_plugin._encoded(image), "x") for image in doc["images"])
        expected = run.likelihoods([Asked(doc["question"], images)], ["dog"])
        assert found[i] == (pytest.approx(float(expected.total[0, 0]), abs=1e-5), bool(expected.greedy[0, 0]))


def test_what_it_cannot_do_is_said(model, project):
    with pytest.raises(ValueError, match="answers greedily, but the task asks for"):
        model.generate_until(requests(lambda i: {"num_beams": 5}))
    with pytest.raises(ValueError, match="tasks of several rounds need another model"):
        model.generate_until_multi_round([])
    with pytest.raises(ValueError, match=r"\['revision'\] are unknown; tcjax takes pretrained and batch_size"):
        type(model)(pretrained=str(project / "run"), revision="main")
    with pytest.raises(ValueError, match="tcjax sees images; the task shows a str"):
        lmms_plugin._flat(["video.mp4"])
    with pytest.raises(ValueError, match="is neither a run's folder"):
        type(model)(pretrained=str(project))
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        _ = lmms_plugin.Other


def test_an_exported_directory_answers_on_torch_as_the_run_does_on_jax(lmms_eval, tmp_path, monkeypatch):
    from tcjax.compressors import resampler
    from tcjax.export import hf_folder, hf_remote
    from tcjax.lmms_plugin import OnJax
    from tests.hosted import IDENTITY, ROOT, a_model, a_run

    monkeypatch.setattr(hf_folder, "certify", lambda folder: {"ran": False, "note": "tests/test_hf.py runs it"})
    run = a_run(resampler.Config(num_queries=3, depth=1, heads=2, head_width=8))
    out = hf_remote.export(run, a_model(run), IDENTITY, out=tmp_path / "out", root=ROOT)
    torch = getattr(lmms_plugin, "Tcjax")(pretrained=str(out), device="cpu").backend  # noqa: B009
    jax = OnJax(Responder(run, a_model(run), root=ROOT, batch=1))
    image = documents()[0]["images"][0].resize((16, 16))
    asked = [("count red ?", [image]), ("count blue ?", [image])]
    said = jax.answers(asked, 5)
    assert torch.answers(asked, 5) == said and any(said)
    for text in ("red", "blue blue"):
        total, greedy = jax.likelihood(*asked[0], text)
        assert torch.likelihood(*asked[0], text) == (pytest.approx(total, abs=1e-5), greedy)
    with pytest.raises(ValueError, match="has no token"):
        torch.likelihood(*asked[0], "")

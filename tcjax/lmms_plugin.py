"""Trained runs, and what was exported of them, as a model of lmms-eval, by its entry point group `lmms_eval.models`.

    python -m lmms_eval --model tcjax --model_args pretrained=runs/<name>,batch_size=16 --tasks pope,mme

`pretrained` is a run's folder, which answers on JAX, or a directory that `tcjax export --to hf` or hf-remote wrote, which
answers on torch. Answers are greedy; images stand before the question, as the run's template puts them.
lmms-eval is imported when it asks for the model and not before: tcjax does not need it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tcjax import content
from tcjax.reply import Asked, Responder

NAME = "tcjax"
Shown = tuple[str, list[Any]]  # a question and its PIL images
_DEFAULT_TOKENS = 128  # where a task does not say how long an answer may be


def manifest() -> Any:
    """What lmms-eval's registry asks an entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.Tcjax", aliases=("tcjax_run",))


def __getattr__(name: str) -> Any:
    if name == "Tcjax":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@lru_cache(maxsize=1)
def _model_class() -> type:
    from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

    class Tcjax(lmms):
        """pretrained: a run's folder or an exported directory. batch_size: questions answered together, on JAX."""

        is_simple = True

        def __init__(self, pretrained: str, batch_size: int | str = 16, device: str | None = None, **kwargs: Any):
            super().__init__()
            if kwargs:
                raise ValueError(f"--model_args {sorted(kwargs)} are unknown; tcjax takes pretrained and batch_size.")
            self.backend = _backend(Path(pretrained), int(batch_size), device)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            settings = [_generation(request.args[1]) for request in requests]
            said = [""] * len(requests)
            for tokens in sorted({tokens for tokens, _ in settings}):  # a length is a program of its own
                some = [place for place, (length, _) in enumerate(settings) if length == tokens]
                asked = [self._asked(*_document(requests[place].args)) for place in some]
                for place, answer in zip(some, self.backend.answers(asked, tokens), strict=True):
                    said[place] = _cut(answer, settings[place][1])
            return said

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Blanks in front of a continuation are the template's, which has its own before an answer."""
            found = []
            for request in requests:
                context, target, visuals, doc_id, task, split = request.args
                text = target if isinstance(target, str) else str(target(self._doc(task, split, doc_id)))
                shown = self._asked(context, visuals, doc_id, task, split)
                found.append(self.backend.likelihood(*shown, text.lstrip()))
            return found

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise ValueError("tcjax answers single questions; tasks of several rounds need another model.")

        def _doc(self, task: str, split: str, doc_id: Any) -> Any:
            return self.task_dict[task][split][doc_id]

        def _asked(
            self, context: str, visuals: Callable[[Any], Any] | None, doc_id: Any, task: str, split: str
        ) -> Shown:
            images = _flat(visuals(self._doc(task, split, doc_id))) if visuals else []
            return context.replace("<image>", "").strip(), images

    return Tcjax


class OnJax:
    """A run's folder, asked with PIL images."""

    def __init__(self, responder: Responder):
        self._responder = responder

    def answers(self, asked: Sequence[Shown], max_tokens: int) -> list[str]:
        return self._responder.answers([self._seen(*one) for one in asked], max_tokens)

    def likelihood(self, question: str, images: Sequence[Any], text: str) -> tuple[float, bool]:
        found = self._responder.likelihoods([self._seen(question, images)], [text])
        return float(found.total[0, 0]), bool(found.greedy[0, 0])

    def _seen(self, question: str, images: Sequence[Any]) -> Asked:
        return Asked(question, tuple(self._responder.picture(_encoded(image), "of the task") for image in images))


def _backend(folder: Path, batch: int, device: str | None) -> Any:
    if (folder / "run.json").is_file():
        return OnJax(Responder.of_folder(folder, root=content.project_root(folder), batch=batch))
    if (folder / "config.json").is_file():
        from tcjax.export.torch.formats.hosted import Hosted

        return Hosted(folder, device)
    raise ValueError(
        f"{folder} is neither a run's folder (run.json) nor an exported Hugging Face directory (config.json); "
        f"pretrained= names one of them."
    )


def _document(arguments: Sequence[Any]) -> tuple[str, Any, Any, str, str]:
    context, _, visuals, doc_id, task, split = arguments
    return context, visuals, doc_id, task, split


def _generation(kwargs: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Tokens and stop strings of a task; ValueError if it wants more than greedy answers."""
    if kwargs.get("num_beams", 1) not in (1, None) or (kwargs.get("do_sample") and kwargs.get("temperature", 0)):
        raise ValueError(f"tcjax answers greedily, but the task asks for {kwargs}; set temperature=0, num_beams=1.")
    until = kwargs.get("until", ())
    stops = (until,) if isinstance(until, str) else tuple(until or ())
    return int(kwargs.get("max_new_tokens", _DEFAULT_TOKENS)), stops


def _cut(answer: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            answer = answer.partition(stop)[0]
    return answer.strip()


def _flat(visuals: Any) -> list[Any]:
    """The images of a document, in one list; a video or audio is refused."""
    if isinstance(visuals, list | tuple):
        return [image for some in visuals for image in _flat(some)]
    if visuals is None:
        return []
    if not hasattr(visuals, "save"):
        raise ValueError(f"tcjax sees images; the task shows a {type(visuals).__name__}.")
    return [visuals]


def _encoded(image: Any) -> bytes:
    """A PIL image as lossless bytes."""
    file = io.BytesIO()
    (image if image.mode in ("RGB", "L") else image.convert("RGB")).save(file, "PNG")
    return file.getvalue()

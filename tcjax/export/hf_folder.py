"""A Hugging Face directory: config.json, model.safetensors, tokenizer, processor, and the proof that it computes our model.

    golden.safetensors   two images, a prompt and its question, the logits of all positions and the greedy answer, from JAX in
                         float32
    verify.py            loads the directory with transformers (no tensor missing, unexpected or misshapen), compares logits
                         to 1e-5 of the largest, the greedy answer, and the prompt and pixels that the processor makes

With transformers installed, verify.py runs in a process of its own before the folder gets its name: a wrong name is only
a warning to transformers, so that nothing but loading and comparing finds it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from tcjax.batch import Batch
from tcjax.config import Run
from tcjax.evaluate.generate import generate
from tcjax.export import hf_chat, origin
from tcjax.export.certificate import reference_device, versions
from tcjax.export.folder import fresh, seal, to_json
from tcjax.interop import names, tensors
from tcjax.pipeline.chat import Chat
from tcjax.pipeline.images import normalise
from tcjax.preprocessor import to_preprocessor
from tcjax.vlm import Vlm, VlmConfig

STEPS = 8  # of the golden answer
TEMPLATES = resources.files("tcjax.export.torch") / "remote"


def write(
    kind: str,
    config: Mapping[str, Any],
    weights: names.Arrays,
    run: Run,
    model: Vlm,
    identity: dict[str, Any],
    *,
    out: Path,
    root: Path,
    code: Mapping[str, str] | None = None,
    about: str,
    prepare: str = "",
) -> Path:
    """The whole directory, verified.

    Args:
        config: config.json. weights: model.safetensors. code: further files by name (remote code).
        about, prepare: for the card, and a line of code between processor and generate in it.

    Raises:
        ValueError: transformers does not compute what was trained from these files; nothing is published.
    """
    chat, model_config = hf_chat.chat_of(run, root), run.model
    assert isinstance(model_config, VlmConfig)
    hf_chat.check(chat)
    with fresh(out, kind) as building:
        tensors.save(building / "model.safetensors", weights)
        (building / "config.json").write_text(to_json(dict(config)))
        ids = hf_chat.token_ids(chat)
        (building / "generation_config.json").write_text(to_json({"do_sample": False, **ids}))
        for name, text in (code or {}).items():
            (building / name).write_text(text)
        hf_chat.write(building, run, chat, root)
        _write_processor(building, chat.template.image, model_config)
        tensors.save(building / "golden.safetensors", golden(model, model_config, chat))
        (building / "verify.py").write_text((TEMPLATES / "verify.py").read_text())
        provenance = origin.provenance(run, identity, root)
        parity = certify(building)
        (building / "README.md").write_text(_card(run, model_config, parity, about, prepare, remote=bool(code)))
        facts = {"compressor": origin.facts(run), "parity": parity, "provenance": provenance, "versions": versions()}
        seal(building, kind, facts)
    return out


def golden(model: Vlm, config: VlmConfig, chat: Chat) -> names.Arrays:
    """What JAX answers in float32: image (uint8), pixel_values, input_ids, logits, generated; prompt and question (UTF-8)."""
    rng = np.random.RandomState(0)
    Y, X = config.tower.pixels.size_YX
    image_BYX3 = rng.randint(0, 256, (2, Y, X, 3)).astype(np.uint8)
    images_BYX3 = normalise(image_BYX3, config.tower.pixels)
    question = hf_chat.words(chat, 3)
    asked = chat.ask(question, num_queries=config.num_queries)
    tokens_BS = np.tile(np.array(asked.ids, np.int32), (2, 1))
    question_BT = np.tile(np.array(chat.instruction(question), np.int32), (2, 1))
    batch = Batch(
        tokens_BS=tokens_BS,
        is_image_BS=np.tile(np.array(asked.is_image), (2, 1)),
        valid_BS=np.ones(tokens_BS.shape, bool),
        images_BYX3=images_BYX3,
        instruction_BT=question_BT,
    )
    with jax.default_device(reference_device()), jax.default_matmul_precision("highest"):
        graphdef, state = nnx.split(model)

        @jax.jit
        def answer(state: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, state)
            seq_BSD, valid_BS = model.embed(batch)
            logits_BSV = model.llm.logits(model.llm(seq_BSD, valid_BS))
            return logits_BSV, generate(model, batch, steps=STEPS, end=chat.stop_ids)

        logits_BSV, generated_BT = answer(state, batch)
    return {
        "image": image_BYX3,
        "pixel_values": images_BYX3.transpose(0, 3, 1, 2),
        "input_ids": tokens_BS.astype(np.int64),
        "logits": np.asarray(logits_BSV, np.float32),
        "generated": np.asarray(generated_BT, np.int64),
        "prompt": np.frombuffer(hf_chat.prompt(chat, question).encode(), np.uint8),
        "question": np.frombuffer(question.encode(), np.uint8),
        "question_ids": question_BT.astype(np.int64),
    }


def certify(building: Path) -> dict[str, Any]:
    """The report of verify.py, run on the folder being written; ValueError with it if transformers disagrees."""
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        return {
            "ran": False,
            "note": "not run here: transformers is not installed; `python verify.py` runs it where it is",
        }
    command = [sys.executable, "-B", str(building / "verify.py"), str(building), "--json", "--no-hashes"]
    with tempfile.TemporaryDirectory() as modules:  # where transformers copies remote code to
        environment = {**os.environ, "HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    try:
        report = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        raise ValueError(
            f"verify.py did not run in transformers; nothing was exported:\n{done.stderr[-2000:]}"
        ) from None
    return judged(report)


def judged(report: dict[str, Any]) -> dict[str, Any]:
    """The report as the manifest holds it; ValueError if it has problems."""
    if report["problems"]:
        lines = "\n".join(report["problems"])
        raise ValueError(f"transformers does not compute what was trained; nothing was exported:\n{lines}")
    return {"ran": True, **{key: value for key, value in report.items() if key != "problems"}}


def _write_processor(building: Path, image_token: str, config: VlmConfig) -> None:
    """The processor. LlavaProcessor emits exactly Q placeholders when the patch is larger than the image."""
    Y, X = config.tower.pixels.size_YX
    image = to_preprocessor(config.tower.pixels)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": 2 * max(Y, X),
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": config.num_queries,
    }
    (building / "preprocessor_config.json").write_text(to_json(image | {"processor_class": "LlavaProcessor"}))
    (building / "processor_config.json").write_text(to_json(processor | {"image_processor": image}))


def _card(run: Run, config: VlmConfig, parity: dict, about: str, prepare: str, *, remote: bool) -> str:
    flag = ", trust_remote_code=True" if remote else ""
    measured = f"logits differ from JAX by {parity['relative']:.1e} of the largest" if parity["ran"] else parity["note"]
    facts, prepare = origin.facts(run), f"{prepare}\n" if prepare else ""
    return f"""# {facts["family"]}: {config.widths.num_tokens} visual tokens become {config.num_queries}

{about}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("."{flag})
processor = AutoProcessor.from_pretrained("."{flag})
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": question}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=image, text=prompt, return_tensors="pt")
{prepare}answer = model.generate(**inputs, max_new_tokens=32)
```

Every image becomes {config.num_queries} placeholders. `python verify.py` checks hashes, names, logits, the greedy answer
and the processor; here {measured}.
"""

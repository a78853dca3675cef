"""The run's LLM alone, as the folder of a published checkpoint: trained whole, or with its LoRA merged into its kernels.

    config.json                         the published one's fields if the run has its folder, ours over them
    model-00001-of-0000N.safetensors    published names, the leaves' own types; model.safetensors.index.json names the shards
    tokenizer files                     as they lie beside the weights that the run began from
    golden.safetensors, verify.py       logits of the model as it was trained, LoRA beside it, and who compares them

AutoModelForCausalLM.from_pretrained(folder) computes what was trained, and so does `llm(folder)` of a config here. One leaf
is on the host at a time, so writing takes about three shards, not the model; with transformers installed, verify.py loads it
once, in float32, before the folder gets its name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tcjax.assemble import published_names
from tcjax.config import Run
from tcjax.export import hf_folder, origin
from tcjax.export.artifact import finite
from tcjax.export.certificate import reference_device, versions
from tcjax.export.folder import fresh, seal, to_json
from tcjax.interop import names, tensors
from tcjax.llms import published
from tcjax.llms.decoder import Decoder, LlmConfig
from tcjax.nn import lora

KIND = "published language model"
SHARD = 5 * 10**9  # bytes, transformers' own limit
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*")
_BESIDE += ("generation_config.json",)
_OURS = ("rope_parameters", "layer_types", "torch_dtype", "transformers_version", "_name_or_path", "auto_map")


def why_not(run: Run) -> str:
    cfg = getattr(run.model, "llm", None)
    if not isinstance(cfg, LlmConfig):
        return f"{run.name} trains a {type(run.model).__name__}, which has no LLM"
    if not {"llm", lora.PART} & set(run.train.trainable):
        return f"{run.name} trains {run.train.trainable}; its LLM is frozen and still the one in {cfg.weights or 'no file'}"
    return published.why_unpublished(cfg)


def export(
    run: Run,
    model: Any,
    identity: dict[str, Any],
    *,
    out: Path,
    root: Path,
    rows: Sequence[dict] = (),
    shard: int = SHARD,
) -> Path:
    """The folder. shard: bytes per file at most, but at least one tensor."""
    llm: Decoder = model.llm
    cfg = llm.cfg
    begun = root / cfg.weights if cfg.weights and (root / cfg.weights).is_dir() else None
    with fresh(out, KIND) as building:
        _write(building, llm, shard)
        config = {
            **(_begun_config(begun) if begun else {}),
            "architectures": [CLASSES[published.model_type(cfg)]],
            **published.to_json(cfg),
            "dtype": np.asarray(llm.norm.scale[...]).dtype.name,
        }
        (building / "config.json").write_text(to_json(config))
        for pattern in _BESIDE if begun else ():
            for path in sorted(begun.glob(pattern)):  # pyright: ignore[reportOptionalMemberAccess]
                shutil.copyfile(path, building / path.name)
        tensors.save(building / "golden.safetensors", _golden(llm))
        (building / "verify.py").write_text((hf_folder.TEMPLATES / "verify.py").read_text())
        facts = {"provenance": origin.provenance(run, identity, root), "versions": versions()}
        facts |= {"parity": hf_folder.certify(building), "lora_merged": run.train.lora.rank > 0}
        seal(building, KIND, facts)
    return out


def published_tensors(llm: Decoder) -> Iterator[names.Arrays]:
    """The tensors of one leaf after another under their published names, updates merged."""
    leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(llm))}
    for name in published_names(llm.cfg)[0]:
        layer = name.jax.rpartition("/")[0]
        wanted = (name.jax, f"{layer}/{lora.PART}/a", f"{layer}/{lora.PART}/b")
        found = {path: np.asarray(leaves[path].get_value()) for path in wanted if path in leaves}
        plain = lora.merged(llm, found)
        yield names.to_torch(finite({name.jax: plain[name.jax]}), [name])


def _write(building: Path, llm: Decoder, limit: int) -> None:
    """Shards and their index, even of one: other files of the folder are safetensors, too."""
    waiting: names.Arrays = {}
    shards: list[list[str]] = []
    total = 0

    def write() -> None:
        tensors.save(building / f"{len(shards)}.safetensors", waiting)
        shards.append(list(waiting))
        waiting.clear()

    for arrays in published_tensors(llm):
        for key, array in arrays.items():
            if waiting and array.nbytes + sum(other.nbytes for other in waiting.values()) > limit:
                write()
            waiting[key] = array
            total += array.nbytes
    write()
    places = {}
    for number, keys in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (building / f"{number}.safetensors").rename(building / name)
        places |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (building / tensors.INDEX).write_text(to_json(index))


def _golden(llm: Decoder) -> names.Arrays:
    """What the trained model answers in float32: input_ids [2, 16], logits [2, 16, V]."""
    ids_BS = np.random.RandomState(0).randint(0, llm.cfg.vocab, (2, 16))
    graphdef, state = nnx.split(llm)

    @jax.jit
    def answer(state: Any) -> jax.Array:
        llm: Decoder = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state))
        return llm.logits(llm(llm.embed(jnp.asarray(ids_BS))))

    with jax.default_device(reference_device()), jax.default_matmul_precision("highest"):
        return {"input_ids": ids_BS.astype(np.int64), "logits": np.asarray(answer(state))}


def _begun_config(folder: Path) -> dict[str, Any]:
    """What config.json of the checkpoint that the run began from says besides: positions, special tokens."""
    path = folder / "config.json"
    said = json.loads(path.read_text()) if path.is_file() else {}
    said = said.get("text_config", said)
    return {key: value for key, value in said.items() if key not in _OURS}

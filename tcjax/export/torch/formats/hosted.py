"""An exported Hugging Face directory that answers, on torch: questions with PIL images in, greedy texts or likelihoods out.

The directory's own processor, chat template and class are used; its own code (trust_remote_code) if it has any.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class Hosted:
    """One question at a time: prompts of a directory need not be padded, and its class decides how images are passed."""

    def __init__(self, folder: Path, device: str | None = None):
        import transformers

        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} is no Hugging Face directory: it has no config.json.")
        remote = "auto_map" in json.loads(path.read_text())
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        load = transformers.AutoModelForImageTextToText.from_pretrained
        self._model = load(folder, trust_remote_code=remote, dtype="auto").to(self._device).eval()
        self._processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=remote)

    def answers(self, asked: Sequence[tuple[str, Sequence[Any]]], max_tokens: int) -> list[str]:
        """The greedy answer to each (question, images)."""
        said = []
        for question, images in asked:
            inputs = self._inputs(question, images)
            with torch.inference_mode():
                ids = self._model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0]
            prompt = inputs["input_ids"][0]
            repeats = torch.equal(ids[: len(prompt)], prompt)  # some classes give the prompt back as well
            new = ids[len(prompt) :] if repeats else ids
            said.append(self._processor.tokenizer.decode(new, skip_special_tokens=True).strip())
        return said

    def likelihood(self, question: str, images: Sequence[Any], text: str) -> tuple[float, bool]:
        """Log-probability of the text behind the prompt, summed over its tokens, and whether it is the greedy one."""
        inputs = self._inputs(question, images)
        ids = self._processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if not ids.shape[1]:
            raise ValueError(f"the continuation {text!r} has no token.")
        ids = ids.to(self._device)
        for name, fill in (("input_ids", ids), ("attention_mask", torch.ones_like(ids))):
            inputs[name] = torch.cat([inputs[name], fill], dim=1)
        with torch.inference_mode():
            logits = self._model(**inputs).logits[0, -ids.shape[1] - 1 : -1].float()
        logp = logits.log_softmax(-1).gather(1, ids[0][:, None])
        return float(logp.sum()), bool((logits.argmax(-1) == ids[0]).all())

    def _inputs(self, question: str, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        turns = [{"role": "user", "content": parts}]
        prompt = self._processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        made = self._processor(
            images=list(images) or None, text=[prompt], return_tensors="pt", add_special_tokens=False
        )
        return {name: value.to(self._device) for name, value in made.items() if name != "token_type_ids"}

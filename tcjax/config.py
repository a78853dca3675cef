"""What a run is made of: frozen dataclasses that hold choices. What follows from a neighbour arrives as an argument.

`Run.model` is any config with `build(rngs)`; the engine's own is `tcjax.vlm.VlmConfig`. Relative paths are relative to
the project root (the folder the config file's project lives in), never to the working directory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How the tower wants its image. size: height, width in pixels; then (value / 255 - mean) / std per channel."""

    size_YX: tuple[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Template:
    """The strings between the spans. image and pad must be one token each, the others may be several ("USER: ")."""

    begin: str = "<bos>"
    image: str = "<image>"
    user: str = "<user>"
    assistant: str = "<assistant>"
    end: str = "<end>"
    pad: str = "<pad>"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of a mixture.

    path: a dataset folder, whose prepared shards lie in `path/prepared`, or a published file or folder of another format.
    format: who reads it (tcjax/pipeline/source.py); "" follows from the path.
    images: the folder below which the image paths of a published file lie; "" is the file's own folder.
    split: a TFDS split, slices included ("train[:4000]"). weight: share of the mixture, relative to the others.
    """

    path: str
    format: str = ""
    images: str = ""
    split: str = "train"
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they become batches.

    batch: global batch, over all hosts. text_length: positions for everything but the image's Q tokens.
    seed: the order of samples is a pure function of (seed, step, batch).
    independent_turns: every turn of a conversation sees the image and itself only, as if asked alone; the image is paid
        for once. False keeps the conversation: later turns see earlier answers.
    turns: so many turns of every conversation, drawn anew each time it comes up; 0 takes all. 1 is how a compressor that
        is told the question is trained the way it is asked.
    instruction_length: positions of the instruction handed to such a compressor; a longer one loses its beginning.
    max_corrupt: share of unreadable images above which a run stops.
    """

    sources: tuple[Source, ...]
    tokenizer: str
    batch: int = 64
    text_length: int = 144
    seed: int = 0
    independent_turns: bool = False
    turns: int = 0
    instruction_length: int = 64
    threads: int = 4
    max_corrupt: float = 0.01


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """An update of low rank beside linear layers of the frozen LLM; it learns where `trainable` names "lora".

    rank: LLaVA's 128. alpha: the update counts alpha / rank times. targets: names of layers in every block.
    """

    rank: int = 128
    alpha: float = 256.0
    targets: tuple[str, ...] = ("query", "key", "value", "out", "gate", "up", "down")

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be at least 1; without an update, lora is None.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the trainable part learns: AdamW, linear warm-up, cosine to `end_lr`, global-norm clip.

    trainable: parts that learn, by the first names of their module paths ("compressor", "llm", "tower"), and "lora" for
        the updates that `lora` adds to the LLM; all else is structurally frozen.
    lora: updates of low rank beside the LLM's layers.
    lr_of: peak learning rates of parts that do not learn at `peak_lr`; they rise and fall alike, so that such a part ends
        at end_lr * its peak / peak_lr.
    warmup: share of the steps. accumulate: microbatches per step; their sum is one step over the global batch.
    compute: "float32" or "bfloat16"; master weights, moments and the loss stay float32.
    weights: safetensors to start the trainable parts from, {part: path}; parts not named start from the seed. A
        compressor also starts from its artifact's folder, such as `tcjax import` writes.
    feature_cache: store the frozen tower's tokens once and share them between runs.
    save_every: steps between checkpoints (0: only the last). log_every: steps between lines of metrics.jsonl.
    """

    steps: int
    trainable: tuple[str, ...] = ("compressor",)
    lora: LoraConfig | None = None
    peak_lr: float = 1e-3
    lr_of: dict[str, float] = field(default_factory=dict)
    end_lr: float = 0.0
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    seed: int = 0
    accumulate: int = 1
    compute: str = "float32"
    weights: dict[str, str] = field(default_factory=dict)
    feature_cache: bool = False
    save_every: int = 500
    keep: int = 2
    log_every: int = 20
    wandb: str = "off"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How a trained run is scored: greedy answers to single questions on `source`.

    boards: at most so many images (0: all). batch: questions per forward pass.
    queries: other numbers of visual tokens at which the same weights are scored too (elastic compressors).
    controls: "blank" (a grey image) and "shuffled" (another sample's image); what they score is owed to language alone.
        For a compressor that is told the question also "null_text" (it is told nothing) and "shuffled_text" (another
        question): what the score loses is owed to the conditioning. The LLM always reads the right question.
    """

    source: Source
    boards: int = 0
    batch: int = 64
    queries: tuple[int, ...] = ()
    controls: tuple[str, ...] = ("blank", "shuffled")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis; -1 takes what the others leave. data: replicas, fsdp: sharded weights, tensor: split heads."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training with its evaluation.

    name: folder below runs/, e.g. "num_queries/resampler-64-s0". label: what reports call its compressor, by default the
    compressor's file; variants of one file need labels of their own.
    """

    name: str
    label: str = ""
    model: object
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig | None = None
    mesh: MeshConfig = MeshConfig()

    def replace(self, **changes) -> Run:
        return dataclasses.replace(self, **changes)

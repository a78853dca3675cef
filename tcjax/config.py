"""What a run is made of: frozen dataclasses that hold choices. What follows from a neighbour arrives as an argument.

`Run.model` is any config with `build(rngs)`; the engine's own is `tcjax.vlm.VlmConfig`. Relative paths are relative to
the project root (the folder the config file's project lives in), never to the working directory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

GEOMETRIES = ("squash", "crop", "pad", "letterbox", "naflex")
RESAMPLES = ("bicubic", "bilinear", "lanczos")
PLACES = ("begin", "message", "front", "mark")  # of Template.place
PASSES = ("span", "message", "between", "whole")  # of Template.passes


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How the tower wants its image: brought to `size_YX`, then (value / 255 - mean) / std per channel.

    size_YX: height, width in pixels. geometry: how an image of another shape gets there:
        "squash" resizes both sides, whatever becomes of the aspect ratio (SigLIP);
        "crop" resizes the shorter side to `shortest` and cuts the middle out (CLIP, DINOv2);
        "pad" makes the image square first, in the middle of int(255 * mean) (LLaVA-1.5), and goes on like "crop";
        "letterbox" is Prismatic's pad: equal borders, so that an odd difference leaves one pixel to the crop;
        "naflex" keeps the aspect ratio within `max_patches` patches of side `patch`, which it hands over as rows (SigLIP2);
            size_YX is then the square its position table stands for.
    shortest: pixels of the shorter side before the crop; 0 is the crop's own. DINOv2 has 256 before a crop of 224.
    resample: "bicubic", "bilinear" or "lanczos", each antialiased, with the arithmetic of PIL.
    """

    size_YX: tuple[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    geometry: str = "squash"
    shortest: int = 0
    resample: str = "bicubic"
    patch: int = 0
    max_patches: int = 0

    def __post_init__(self):
        for name, possible in (("geometry", GEOMETRIES), ("resample", RESAMPLES)):
            if getattr(self, name) not in possible:
                raise ValueError(f"pixels.{name}={getattr(self, name)!r} is unknown; possible: {list(possible)}.")
        cropped = self.geometry in ("crop", "pad", "letterbox")
        if self.shortest and (not cropped or self.shortest < max(self.size_YX)):
            raise ValueError(
                f"pixels.shortest={self.shortest} is the shorter side before a crop of {self.size_YX}: at least "
                f"{max(self.size_YX)}, for the geometries crop, pad and letterbox; this one is {self.geometry!r}."
            )
        if cropped and not self.shortest and self.size_YX[0] != self.size_YX[1]:
            raise ValueError(
                f"pixels.size_YX={self.size_YX} is no square: say pixels.shortest, the side before the crop."
            )
        naflex = self.geometry == "naflex"
        if naflex != (self.patch > 0) or naflex != (self.max_patches > 0):
            raise ValueError(
                f"geometry={self.geometry!r} with patch={self.patch} and max_patches={self.max_patches}: naflex needs both, "
                f"the other geometries take neither."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image as the tower reads it: [Y, X, 3], or naflex's patch rows [max_patches, patch * patch, 3]."""
        return (self.max_patches, self.patch**2, 3) if self.geometry == "naflex" else (*self.size_YX, 3)


@dataclass(frozen=True, kw_only=True)
class Template:
    """The strings around a conversation, which of them are learned, and what is tokenised together. Named ones: configs/.

        begin system   user first question close   assistant lead answer end   again user question close   assistant ...
                                                             ~~~~~~~~~~~~~~~ supervised, from lead to end

    begin: ids in front of all, apart from the text. first: before the first question only. again: before every later user.
    lead: between assistant mark and answer; prompts end before it. stop: what ends a generation, "" is end as a whole.
    question: False leaves questions out (captions). strip: of blanks around every question and answer.
    supervise_assistant: the assistant mark is learned too. everywhere: tokens learned wherever they stand.
    image: the token at image positions; "" needs none, they carry the id of pad. pad: a token; "" is the tokenizer's own.
    image_before, image_after: around every image. image_gap: between an image in front and its question.
    place: where images go: "begin" behind begin; "message" before the user mark of their turn; "front" before their turn's
        question, where a turn of several keeps them at its marks; "mark" where the published `<image>` stands.
    passes: what is tokenised in one pass: "span" every string alone, "message" a question with its marks and an answer with
        its end, "between" what lies between two images (LLaVA), "whole" all of it, image tokens included (transformers).
    """

    begin: str = "<bos>"
    system: str = ""
    user: str = "<user>"
    first: str = ""
    close: str = ""
    assistant: str = "<assistant>"
    lead: str = ""
    end: str = "<end>"
    stop: str = ""
    again: str = ""
    question: bool = True
    strip: bool = False
    supervise_assistant: bool = False
    everywhere: tuple[str, ...] = ()
    image: str = "<image>"
    image_before: str = ""
    image_after: str = ""
    image_gap: str = ""
    place: str = "begin"
    passes: str = "span"
    pad: str = "<pad>"

    def __post_init__(self):
        for name, possible in (("place", PLACES), ("passes", PASSES)):
            if getattr(self, name) not in possible:
                raise ValueError(f"Template.{name}={getattr(self, name)!r} is unknown; choose one of {list(possible)}.")
        if self.passes == "whole" and not self.image:
            raise ValueError('Template.passes="whole" tokenises images with their text and needs an image token.')


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of a mixture.

    path: a dataset folder, whose prepared shards lie in `path/prepared`, or a published file or folder of another format;
        tars and parquet files may be counted in braces, "shard-{000..012}.tar".
    format: who reads it (tcjax/pipeline/source.py); "" follows from the path.
    images: the folder below which the image paths of a published file lie; "" is the file's own folder.
    split: a TFDS split, slices included ("train[:4000]"); of a folder of parquet files their first name, "train".
    sampling: which rows: "all", "first:1000", "end:10%", "random:1000", drawn once by `seed` alone.
    min_rating: keeps only the turns of a parquet row whose every rating is at least this (FineVision: 1 to 5); 0 keeps all.
    weight: share of the mixture, relative to the others.
    """

    path: str
    format: str = ""
    images: str = ""
    split: str = "train"
    sampling: str = "all"
    seed: int = 0
    min_rating: int = 0
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they become batches.

    tokenizer: a tokenizer.json, or a checkpoint's folder with a tokenizer.json or a tokenizer.model.
    template: how conversations are written; the tokens it names are the tokenizer's.
    batch: global batch, over all hosts. text_length: positions for everything but the Q tokens of every image.
    batching: how samples become rows of `images` * Q + text_length positions. "rows": one each. "packed": as many as fit,
        as segments that do not see each other. "grouped": one each, in batches of like length, with or without images;
        a batch is as long as its own kind wants, `buckets` lengths in all, each of which is compiled once.
    images: the most images of a row (R), so of a sample; every row costs so many, a blank one where it has fewer.
    seed: the order of samples is a pure function of (seed, step, batch).
    independent_turns: every turn of a conversation sees the image and itself only, as if asked alone; the image is paid
        for once. False keeps the conversation: later turns see earlier answers.
    turns: so many turns of every conversation, drawn anew each time it comes up; 0 takes all. 1 is how a compressor that
        is told the question is trained the way it is asked.
    instruction_length: positions of the instruction handed to such a compressor; a longer one loses its beginning.
    max_corrupt: share of samples that cannot be used (an unreadable image, no answer that fits) above which a run stops.
    """

    sources: tuple[Source, ...]
    tokenizer: str
    template: Template = Template()
    batch: int = 64
    text_length: int = 144
    batching: str = "rows"
    images: int = 1
    buckets: int = 8
    seed: int = 0
    independent_turns: bool = False
    turns: int = 0
    instruction_length: int = 64
    threads: int = 4
    max_corrupt: float = 0.01


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """An update of low rank beside linear layers of the frozen LLM; it learns where `trainable` names "lora".

    rank: of the update, LLaVA's is 128; 0 is none. alpha: the update counts alpha / rank times. targets: names of layers in
        every block.
    """

    rank: int = 0
    alpha: float = 256.0
    targets: tuple[str, ...] = ("query", "key", "value", "out", "gate", "up", "down")

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} must be at least 1, or 0 for no update.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the trainable part learns: AdamW, linear warm-up, cosine to `end_lr`, global-norm clip.

    trainable: parts that learn, by the first names of their module paths ("compressor", "llm", "tower"), and "lora" for
        the updates that `lora` adds to the LLM; all else is structurally frozen.
    lora: updates of low rank beside the LLM's layers.
    lr_of: peak learning rates of parts that do not learn at `peak_lr`; they rise and fall alike, so that such a part ends
        at end_lr * its peak / peak_lr.
    remat: what the backward pass finds of the LLM's blocks (gradient checkpointing): "none" leaves everything there; "full"
        computes them again, a third more work, and memory for one block instead of all; "save-attention" keeps what
        attention gave; "offload" is "full" with what goes from block to block in the host's memory.
    warmup: share of the steps. accumulate: microbatches per step; their sum is one step over the global batch.
    compute: "float32" or "bfloat16"; master weights, moments and the loss stay float32.
    frozen: how the weights of a frozen tower and LLM lie in memory. "float32"; "bfloat16"; or "int8" and "nf4", the kernels
        of their blocks in 8 or 4 bits and the rest in bfloat16 (`pip install tcjax[quantised]`).
    weights: safetensors to start the trainable parts from, {part: path}; parts not named start from the seed. A
        compressor also starts from its artifact's folder, such as `tcjax import` writes.
    feature_cache: "float32" or "bfloat16" stores the frozen tower's tokens once, in that type, and shares them between
        runs; "" runs the tower inline.
    save_every: steps between checkpoints (0: only the last). log_every: steps between lines of metrics.jsonl.
    """

    steps: int
    trainable: tuple[str, ...] = ("compressor",)
    lora: LoraConfig = LoraConfig()
    peak_lr: float = 1e-3
    lr_of: dict[str, float] = field(default_factory=dict)
    end_lr: float = 0.0
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    seed: int = 0
    accumulate: int = 1
    remat: str = "none"
    compute: str = "float32"
    frozen: str = "float32"
    weights: dict[str, str] = field(default_factory=dict)
    feature_cache: str = ""
    save_every: int = 500
    keep: int = 2
    log_every: int = 20
    wandb: str = "off"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How a trained run is scored: greedy answers to single questions on `source`.

    boards: at most so many images (0: all). batch: questions per forward pass.
    queries: other numbers of visual tokens at which the same weights are scored too (elastic compressors).
    controls: "blank" (a grey image), "shuffled" (another sample's image) and "random" (noise of the data's own colours); what
        they score is owed to language alone.
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

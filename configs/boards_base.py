"""The embedded base: a small tower, then a small LLM on its tokens, both of the real architecture.

    tcjax train configs/boards_base.py:tower    dense labels: digit, colour, row and column of every patch
    tcjax train configs/boards_base.py:short    tower frozen; projector and LLM on 8 x 8 averaged tokens, to learn the words
    tcjax train configs/boards_base.py:llm      the same two on all 256 tokens: what is shipped

`experiments/boards_base/make.sh` runs the three and exports each. Joint training from scratch hardly moves; in stages each
learns what the next one reads, and a board of the short stage costs less than half of one with all tokens. Questions are
trained as they are evaluated, each as if it were asked alone. Weights carry their published names: the tower loads as a
SiglipVisionModel, the LLM as a LlamaForCausalLM.
"""

from tcjax.compressors import avg_pool, mlp
from tcjax.config import DataConfig, EvaluateConfig, Pixels, Run, Source, TrainConfig
from tcjax.llms.decoder import LlmConfig
from tcjax.towers.patch_labels import PatchLabelsConfig
from tcjax.towers.vit import VitConfig
from tcjax.vlm import VlmConfig

BOARDS = "data/digit_boards"
GRIDS = "data/digit_grids"
TOKENIZER = "configs/boards_base/tokenizer.json"
TEST = EvaluateConfig(source=Source(path=BOARDS, split="test"), controls=())  # studies ask the controls


def tower_config(weights: str = "configs/boards_base/tower.safetensors") -> VitConfig:
    """SigLIP's architecture at 64 x 64 pixels, patch 4: 16 x 16 = 256 tokens of width 96; 0.5 M parameters."""
    return VitConfig(
        pixels=Pixels(size_YX=(64, 64)),
        patch=4,
        width=96,
        layers=4,
        heads=3,
        feed_forward=384,
        activation="gelu_pytorch_tanh",
        norm_eps=1e-6,
        class_token=False,
        patch_bias=True,
        pre_norm=False,
        post_norm=True,
        weights=weights,
    )


def llm_config(weights: str = "configs/boards_base/llm.safetensors") -> LlmConfig:
    """Llama's architecture, width 128, 4 layers, grouped queries, tied head; 0.8 M parameters, 64 words."""
    return LlmConfig(
        vocab=64,
        width=128,
        layers=4,
        heads=4,
        kv_heads=2,
        head_width=32,
        feed_forward=384,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie=True,
        weights=weights,
    )


def data(seed: int = 0) -> DataConfig:
    """All training boards, 16 at a time."""
    return DataConfig(sources=(Source(path=BOARDS),), tokenizer=TOKENIZER, batch=16, seed=seed, independent_turns=True)


def tower() -> Run:
    """Stage one: the tower and a linear head per patch."""
    return Run(
        name="boards_base/tower",
        model=PatchLabelsConfig(tower=tower_config(weights=""), kinds=(11, 7)),
        data=DataConfig(
            sources=(Source(path=GRIDS, weight=0.7), Source(path=BOARDS, weight=0.3)), tokenizer=TOKENIZER, batch=16
        ),
        train=TrainConfig(
            steps=2_400, trainable=("tower", "head"), peak_lr=1.5e-3, warmup=0.05, weight_decay=0.05, save_every=400
        ),
    )


def short() -> Run:
    """Stage two: projector and LLM behind the frozen tower, on the means of 2 x 2 tokens."""
    model = VlmConfig(tower=tower_config(), compressor=avg_pool.Config(num_queries=64), llm=llm_config(weights=""))
    return _language("short", model, data(), steps=4_000, peak_lr=1.5e-3)


def llm() -> Run:
    """Stage three: the same on all 256 tokens."""
    parts = "runs/boards_base/short/parts"
    model = VlmConfig(tower=tower_config(), compressor=mlp.Config(), llm=llm_config(weights=f"{parts}/llm.safetensors"))
    weights = {"compressor": f"{parts}/projector.safetensors"}
    return _language("llm", model, data(seed=1), steps=1_800, peak_lr=1e-3, weights=weights)


def _language(stage: str, model: VlmConfig, data: DataConfig, **changes) -> Run:
    train = TrainConfig(
        trainable=("compressor", "llm"), warmup=0.03, weight_decay=0.01, b2=0.98, feature_cache="float32", **changes
    )
    return Run(name=f"boards_base/{stage}", model=model, data=data, train=train, evaluate=TEST)

"""Training a compressor on the digit boards, between the embedded tower and the embedded LLM, both frozen.

tcjax train configs/boards.py                        the resampler, 256 -> 64 tokens
tcjax train configs/boards.py:pooled                 average pooling
tcjax train configs/boards.py:told                   a compressor that is told the question, 256 -> 16 tokens
tcjax train configs/boards.py:matryoshka             one training, scored at 64, 16 and 4 tokens
tcjax train configs/boards.py --model.compressor.num-queries 16 --train.steps 1000
"""

from configs.boards_base import BOARDS, TOKENIZER, llm_config, tower_config
from configs.compressors import BOARDS as CATALOGUE
from tcjax.compressors import mlp
from tcjax.config import DataConfig, EvaluateConfig, Run, Source, TrainConfig
from tcjax.vlm import VlmConfig

PROJECTOR = "configs/boards_base/projector.safetensors"  # what the LLM was trained with
BATCH, PEAK_LR = 8, 5e-3  # small batches and large steps: see experiments/num_queries/README.md
TOLD_BATCH, TOLD_PEAK_LR = 32, 2e-3  # one question a row, not a board's thirteen: see experiments/catalogue/README.md


def compressed(
    name: str,
    compressor: str,
    num_queries: int,
    *,
    steps: int,
    seed: int = 0,
    test: int = 200,
    also: tuple[int, ...] = (),
) -> Run:
    """One compressor learns for `steps` batches of 8 boards; a short training reads each board once.

    A compressor that is told the question reads batches of 32 single questions, as it will be asked, and answers to the
    controls of the text too. also: other numbers of tokens at which an elastic one is scored.
    """
    config = CATALOGUE[compressor](num_queries)
    told = "text" in config.needs
    batch = TOLD_BATCH if told else BATCH
    boards = min(steps * batch, 20_000)
    return Run(
        name=name,
        label=compressor,
        model=VlmConfig(tower=tower_config(), compressor=config, llm=llm_config()),
        data=DataConfig(
            sources=(Source(path=BOARDS, split=f"train[:{boards}]"),),
            tokenizer=TOKENIZER,
            batch=batch,
            # The longest conversation of the boards has 129 tokens, the longest single question with its answer 28.
            text_length=28 if told else 130,
            turns=1 if told else 0,
            instruction_length=8,
            seed=seed,
            independent_turns=True,
        ),
        train=TrainConfig(
            steps=steps,
            peak_lr=TOLD_PEAK_LR if told else PEAK_LR,
            warmup=0.05,
            weight_decay=0.01,
            b2=0.98,
            seed=seed,
            feature_cache="float32",
            save_every=200,
        ),
        evaluate=EvaluateConfig(
            source=Source(path=BOARDS, split="test"),
            boards=test,
            queries=also,
            controls=("blank", "shuffled", *(("null_text", "shuffled_text") if told else ())),
        ),
    )


def reference(name: str = "boards/mlp-256", test: int = 200) -> Run:
    """Nothing compressed: the base's own projector, 256 tokens, 0 steps."""
    run = compressed(name, "mlp", 256, steps=1, test=test)
    train = TrainConfig(steps=0, weights={"compressor": PROJECTOR}, feature_cache="float32")
    return run.replace(model=VlmConfig(tower=tower_config(), compressor=mlp.Config(), llm=llm_config()), train=train)


def run() -> Run:
    """The resampler at 64 tokens: 4x fewer."""
    return compressed("boards/resampler-64", "resampler", 64, steps=10_000)


def pooled() -> Run:
    """Average pooling at 64 tokens."""
    return compressed("boards/avg_pool-64", "avg_pool", 64, steps=10_000)


def told() -> Run:
    """The text-primed perceiver at 16 tokens."""
    return compressed("boards/query_resampler-16", "query_resampler", 16, steps=5_000)


def matryoshka() -> Run:
    """Matryoshka queries: one training for every number of tokens up to 64."""
    return compressed("boards/mqt-64", "mqt", 64, steps=10_000, also=(16, 4))

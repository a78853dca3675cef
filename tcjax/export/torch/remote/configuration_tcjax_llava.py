"""LlavaConfig with a compressor: `compressor` is compressor_config.json, `vision_levels` are the earlier layers it reads.

`question_marks` are the token ids before and behind a user's question, for a compressor that is told it.
"""

from transformers import LlavaConfig


class TcjaxLlavaConfig(LlavaConfig):
    model_type = "tcjax_llava"
    compressor: dict | None = None
    vision_levels: list | None = None
    question_marks: dict | None = None

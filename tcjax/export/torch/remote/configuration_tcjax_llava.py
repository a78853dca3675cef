"""LlavaConfig with a compressor: `compressor` is compressor_config.json, `vision_levels` are the earlier layers it reads."""

from transformers import LlavaConfig


class TcjaxLlavaConfig(LlavaConfig):
    model_type = "tcjax_llava"
    compressor: dict | None = None
    vision_levels: list | None = None

"""Llava whose projector is a trained visual-token compressor (modeling_compressor.py): Q tokens per image.

The tower is read where it was read in training: at -1 behind its last norm if its class has one, else at that layer.
A compressor that is told the question finds it in the prompt, between the marks of config.question_marks.
"""

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from .configuration_tcjax_llava import TcjaxLlavaConfig
from .modeling_compressor import Compressor


class TcjaxLlavaModel(LlavaModel):
    config_class = TcjaxLlavaConfig

    def __init__(self, config: TcjaxLlavaConfig):
        super().__init__(config)
        self.multi_modal_projector = Compressor(config.compressor)
        self.post_init()

    def forward(self, input_ids=None, pixel_values=None, mm_encoder_outputs=None, **kwargs):
        if pixel_values is not None and "text" in self.config.compressor["needs"]:
            if input_ids is None or len(input_ids) != len(pixel_values):
                raise ValueError("the compressor is told the question: give input_ids, and one image per prompt")
            image = self.get_image_features(pixel_values, question_ids=input_ids)
            mm_encoder_outputs, pixel_values = {"image": image}, None
        return super().forward(
            input_ids=input_ids, pixel_values=pixel_values, mm_encoder_outputs=mm_encoder_outputs, **kwargs
        )

    def question(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The embeddings of what lies between the marks, all of a prompt's questions one after another."""
        user, assistant = self.config.question_marks["user"], self.config.question_marks["assistant"]
        found = []
        for row in input_ids.tolist():
            asked, start, place = [], None, 0
            while place < len(row):
                mark = user if start is None else assistant
                if row[place : place + len(mark)] != mark:
                    place += 1
                    continue
                if start is not None:
                    asked += row[start:place]
                place += len(mark)
                start = place if start is None else None
            found.append(asked)
        length = max(1, max(map(len, found)))
        ids = torch.tensor([asked + [0] * (length - len(asked)) for asked in found], device=input_ids.device)
        sizes = torch.tensor([len(asked) for asked in found], device=input_ids.device)
        valid = torch.arange(length, device=input_ids.device) < sizes[:, None]
        return {"text": self.get_input_embeddings()(ids), "text_valid": valid}

    def get_image_features(self, pixel_values: torch.Tensor, question_ids: torch.Tensor | None = None, **kwargs):
        """The tower's output, its pooler_output a list of [Q, width] per image. question_ids: prompts holding questions."""
        outputs = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0  # the class token
        layer, states = self.config.vision_feature_layer, outputs.hidden_states
        tokens = (outputs.last_hidden_state if layer == -1 else states[layer])[:, first:]
        told = {} if question_ids is None else self.question(question_ids)
        if self.config.vision_levels:
            told["levels"] = torch.cat([states[level][:, first:] for level in self.config.vision_levels], dim=-1)
        outputs.pooler_output = list(self.multi_modal_projector(tokens, **told))
        return outputs


class TcjaxLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = TcjaxLlavaConfig

    def __init__(self, config: TcjaxLlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = TcjaxLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _supports_mm_encoder_outputs(self) -> bool:
        """generate() encodes images before it looks at the prompt; a compressor that is told the question needs both."""
        return "text" not in self.config.compressor["needs"] and super()._supports_mm_encoder_outputs()

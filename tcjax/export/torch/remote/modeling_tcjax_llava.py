"""Llava whose projector is a trained visual-token compressor (modeling_compressor.py): Q tokens per image.

The tower is read where it was read in training: at -1 behind its last norm if its class has one, else at that layer.
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

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs):
        """The tower's output, its pooler_output a list of [Q, width] per image."""
        outputs = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0  # the class token
        layer, states = self.config.vision_feature_layer, outputs.hidden_states
        tokens = (outputs.last_hidden_state if layer == -1 else states[layer])[:, first:]
        told = {}
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

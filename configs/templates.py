"""Published conversation templates as plain data; a run names one in `DataConfig.template`.

What is written and what is learned equal the named code's on the conversations of tests/golden/chat. Image tokens: Llama 2
and Vicuna have none, their image positions carry <unk>; to export such a model name a token that text never holds, such as
dataclasses.replace(VICUNA_V1, image="<unk>", pad="</s>").
"""

from dataclasses import replace

from tcjax.config import Template

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)  # 154 characters
LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
HONEYBEE_SYSTEM = (
    "The following is a conversation between a curious human and AI assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# haotian-liu/LLaVA, with Llama's tokenizer.

PLAIN = Template(  # first stage: image, caption, newline; no question and no end mark
    begin="<s>",
    user="",
    assistant="",
    end="\n",
    question=False,
    image="",
    pad="<unk>",
    passes="between",
)
VICUNA_V1 = Template(  # the key "v1"
    begin="<s>",
    system=f"{VICUNA_SYSTEM} ",
    user="USER: ",
    close=" ",
    assistant="ASSISTANT:",
    lead=" ",
    end="</s>",
    image="",
    image_gap="\n",
    place="front",
    passes="between",
    pad="<unk>",
)
LLAMA_2 = Template(  # the key "llava_llama_2"
    begin="<s>",
    user="[INST] ",
    first=f"<<SYS>>\n{LLAVA_SYSTEM}\n<</SYS>>\n\n",
    close=" [/INST]",
    assistant="",
    lead=" ",
    end=" </s>",
    stop="</s>",
    again="<s>",
    image="",
    image_gap="\n",
    place="front",
    passes="between",
    pad="<unk>",
)

# Canonical chats: an answer is learned with the marks that close its message.

CHATML = Template(  # nanoVLM, SmolLM2; no system message of its own
    begin="",
    user="<|im_start|>user\n",
    close="<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    end="<|im_end|>\n",
    stop="<|im_end|>",
    image="",
    place="front",
    passes="between",
    pad="",
)
QWEN = replace(  # Qwen2-VL's writing of images; the tokens are in the vocabulary of every Qwen 2.5 and 3
    CHATML,
    system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    image="<|image_pad|>",
    image_before="<|vision_start|>",
    image_after="<|vision_end|>",
    pad="<|endoftext|>",
)
LLAMA_3 = Template(
    begin="<|begin_of_text|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n",
    close="<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    image="<|reserved_special_token_0|>",
    place="front",
    passes="between",
    pad="",
)

# LLaVA-VL/LLaVA-NeXT: assistant headers are learned, and marks wherever they stand. For reproduction.

QWEN_LLAVA_NEXT = replace(
    CHATML,
    system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    image_gap="\n",
    supervise_assistant=True,
    everywhere=("<|im_start|>", "<|im_end|>", "\n"),
    pad="<|endoftext|>",
)
LLAMA_3_LLAVA_NEXT = replace(
    LLAMA_3,
    system=f"<|start_header_id|>system<|end_header_id|>\n\n{LLAVA_SYSTEM}<|eot_id|>",
    image_gap="\n",
    strip=True,
    supervise_assistant=True,
    everywhere=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

# TRI-ML/prismatic-vlms: the image behind the begin mark, every message tokenised alone.

PRISMATIC_ALIGN = replace(PLAIN, end="</s>", strip=True)
PRISMATIC_VICUNA = replace(VICUNA_V1, lead="", strip=True, place="begin", image_gap="", passes="message")
PRISMATIC_LLAMA_2 = Template(
    begin="<s>",
    user="[INST] ",
    first=f"<<SYS>\n{LLAVA_SYSTEM}\n<</SYS>>\n\n",  # published so, with one bracket missing
    close=" [/INST]",
    assistant="",
    end="</s>",
    strip=True,
    image="",
    passes="message",
    pad="<unk>",
)
PRISMATIC_BASE = replace(PRISMATIC_LLAMA_2, user="In: ", first="", close="\n", assistant="Out:")

# kakaobrain/honeybee: own lines for image and question, strings tokenised one by one.

HONEYBEE_PRETRAIN = replace(PLAIN, end="</s>", passes="span")
HONEYBEE = Template(
    begin="<s>",
    system=HONEYBEE_SYSTEM,
    user="\nHuman: ",
    assistant="\nAI: ",
    end="</s>",
    image="",
    image_before="\nHuman: ",
    place="message",
    passes="span",
    pad="<unk>",
)

# llava-hf/llava-1.5-*-hf as transformers writes it: no system message, images tokenised with their text (id 32000).

LLAVA_HF = replace(VICUNA_V1, system="", image="<image>", passes="whole", pad="<pad>")

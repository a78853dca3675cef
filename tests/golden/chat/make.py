"""Makes the golden files beside it by running the published code itself; README.md says from which commits.

    python make.py CHECKOUTS        a folder with LLaVA, LLaVA-NeXT, prismatic-vlms, honeybee, nanoVLM

Needs transformers==4.37.2, tokenizers==0.15.2, sentencepiece==0.2.0, protobuf<4, torch. Functions are taken out of their
files by name, unchanged: the files import training libraries that have no part in this.
"""

import ast
import contextlib
import copy
import gzip
import io
import json
import re
import sys
import types
from pathlib import Path

import corpus
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE, CHECKOUTS = Path(__file__).parent, Path(sys.argv[1])
IGNORED, IMAGE = -100, -200
NUM, FEW = 120, 60


def taken(path: str, names: tuple, **space) -> types.SimpleNamespace:
    """The named functions and classes of a file, executed in `space`."""
    tree = ast.parse((CHECKOUTS / path).read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    for annotated in ast.walk(tree):
        if isinstance(annotated, ast.FunctionDef):
            annotated.returns = None
            for argument in (*annotated.args.args, *annotated.args.kwonlyargs):
                argument.annotation = None
    exec(compile(tree, path, "exec"), space)
    return types.SimpleNamespace(**{name: space[name] for name in names})


def module(path: str) -> types.ModuleType:
    made = types.ModuleType(Path(path).stem)
    sys.modules[made.__name__] = made
    exec(compile((CHECKOUTS / path).read_text(), path, "exec"), made.__dict__)
    return made


def row(ids: list, labels: list, warned: bool = False) -> dict:
    """ids with -200 at images; supervised as [first, past) pairs."""
    spans, on = [], False
    for place, label in enumerate([*labels, IGNORED]):
        if (label != IGNORED) != on:
            on = not on
            spans.append([place]) if on else spans[-1].append(place)
    return {"ids": ids, "supervised": spans} | ({"warned": True} if warned else {})


def train_tokenizers() -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.lines()), model_writer=written, model_type="bpe", vocab_size=800,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        character_coverage=0.999, allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    (HERE / "tokenizer.model").write_bytes(written.getvalue())
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    special += ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += ["<|reserved_special_token_0|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(corpus.lines(), trainer)
    made.add_special_tokens(special)
    assert made.token_to_id("Ċ") == 198
    made.save(str(HERE / "bytes.json"), pretty=False)


def llama(legacy: bool, slow: bool = True):
    kind = transformers.LlamaTokenizer if slow else transformers.LlamaTokenizerFast
    made = kind(str(HERE / "tokenizer.model"), legacy=legacy, padding_side="right", model_max_length=2048)
    made.pad_token = made.unk_token
    return made


def llava() -> dict:
    conversation = module("LLaVA/llava/conversation.py")
    image_token = taken("LLaVA/llava/mm_utils.py", ("tokenizer_image_token",), IMAGE_TOKEN_INDEX=IMAGE, torch=torch)
    names = ("preprocess_multimodal", "preprocess_llama_2", "preprocess_v1", "preprocess_plain")
    run = taken(
        "LLaVA/llava/train/train.py", names, copy=copy, torch=torch, conversation_lib=conversation, IGNORE_INDEX=IGNORED,
        tokenizer_image_token=image_token.tokenizer_image_token, DEFAULT_IMAGE_TOKEN="<image>",
        IS_TOKENIZER_GREATER_THAN_0_14=True,
    )  # fmt: skip
    asked = types.SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
    found = {}
    for legacy in (True, False):
        tokenizer = llama(legacy)
        for name, preprocess in (
            ("v1", run.preprocess_v1),
            ("llava_llama_2", run.preprocess_llama_2),
            ("v1 several", run.preprocess_v1),
            ("plain", lambda sources, tokenizer, has_image: run.preprocess_plain(sources, tokenizer)),
        ):
            conversation.default_conversation = conversation.conv_templates[name.split()[0]]
            rows = []
            for sample in (
                corpus.several(FEW) if "several" in name else corpus.conversations(NUM if name == "v1" else FEW)
            ):
                source = copy.deepcopy(sample["conversations"])
                if name == "plain":
                    if "image" not in sample:
                        continue
                    source = source[:2]
                has_image = "image" in sample
                source = run.preprocess_multimodal([source], asked)[0] if has_image else source
                said = io.StringIO()
                with contextlib.redirect_stdout(said):
                    out = preprocess([source], tokenizer, has_image=has_image)
                ids, labels = out["input_ids"][0].tolist(), out["labels"][0].tolist()
                rows.append(row(ids, labels, "mismatch" in said.getvalue()))
            found[f"{name.replace(' ', '-')}/{'legacy' if legacy else 'new'}"] = rows
    conversation.default_conversation = conversation.conv_templates["v1"]
    written = conversation.default_conversation.copy()
    for role, text in zip(written.roles * 2, ("<image>\nQ1", "A1", "Q2", "A2"), strict=True):
        written.append_message(role, text)
    return found | {"v1/prompt": written.get_prompt()}


def next_() -> dict:
    names = ("preprocess_multimodal", "preprocess_qwen", "preprocess_llama3")
    run = taken(
        "LLaVA-NeXT/llava/train/train.py", names, copy=copy, re=re, torch=torch, IGNORE_INDEX=IGNORED,
        IMAGE_TOKEN_INDEX=IMAGE, DEFAULT_IMAGE_TOKEN="<image>",
        conversation_lib=types.SimpleNamespace(default_conversation=types.SimpleNamespace(version="")),
    )  # fmt: skip
    headers = (
        "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>"
    )
    headers += (
        "\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + "
    )
    headers += "content %}{% endif %}{{ content }}{% endfor %}"  # of meta-llama/Meta-Llama-3-8B-Instruct
    qwen = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / "bytes.json"), additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    llama3 = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / "bytes.json"), bos_token="<|begin_of_text|>", chat_template=headers
    )
    asked = types.SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
    found = {}
    for name, preprocess, tokenizer in (
        ("qwen", run.preprocess_qwen, qwen),
        ("llama_3", run.preprocess_llama3, llama3),
    ):
        rows = []
        for sample in corpus.conversations(FEW):
            source, has_image = copy.deepcopy(sample["conversations"]), "image" in sample
            source = run.preprocess_multimodal([source], asked)[0] if has_image else source
            if name == "llama_3":  # its template trims; only what needs no trimming is compared
                for message in source:
                    message["value"] = message["value"].strip()
            out = preprocess([source], tokenizer, has_image=has_image)
            rows.append(row(out["input_ids"][0].tolist(), out["labels"][0].tolist()))
        found[name] = rows
    return found


def nano() -> list:
    source = ast.parse((CHECKOUTS / "nanoVLM/data/datasets.py").read_text())
    base = next(node for node in source.body if getattr(node, "name", "") == "BaseDataset")
    base.bases = []
    space = {"torch": torch, "get_image_string": None, "logging": None}
    exec(compile(ast.Module([base], []), "datasets.py", "exec"), space)
    config = (CHECKOUTS / "nanoVLM/models/config.py").read_text()
    template = ast.literal_eval(re.search(r"lm_chat_template: str = (\".*\")", config)[1])

    class Newer(transformers.PreTrainedTokenizerFast):
        """apply_chat_template of the transformers that nanoVLM wants: a dict where asked, no special tokens added."""

        def apply_chat_template(self, messages, tokenize=True, return_dict=False, add_special_tokens=False):
            text = super().apply_chat_template(messages, tokenize=False)
            found = self(text, add_special_tokens=add_special_tokens)
            return (found if return_dict else found["input_ids"]) if tokenize else text

    tokenizer = Newer(tokenizer_file=str(HERE / "bytes.json"), chat_template=template, eos_token="<|im_end|>")
    dataset = object.__new__(space["BaseDataset"])
    dataset.tokenizer = tokenizer
    dataset.prefix_len = dataset._get_prefix_len()
    roles, rows = {"human": "user", "gpt": "assistant"}, []
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for sample in corpus.conversations(FEW):
        messages = [{"role": roles[m["from"]], "content": m["value"]} for m in sample["conversations"]]
        if "image" in sample:  # its data has no marks: the image goes to the very front
            messages[0]["content"] = "<|image_pad|>" + messages[0]["content"].replace("<image>", "").strip()
        ids, mask, _ = dataset._prepare_inputs_and_loss_mask(messages)
        ids, labels = ids.tolist(), torch.where(mask, 1, IGNORED).tolist()
        rows.append(row([IMAGE if i == image else i for i in ids], labels))
    return rows


def prismatic() -> dict:
    folder = "prismatic-vlms/prismatic/models/backbones/llm/prompting/"
    base = {"ABC": object, "abstractmethod": lambda f: f}
    builders: dict = {"align": None}
    for file, name, kind in (
        ("base", "base", "PurePromptBuilder"),
        ("llama2_chat", "llama_2", "LLaMa2ChatPromptBuilder"),
        ("vicuna_v15", "vicuna", "VicunaV15ChatPromptBuilder"),
    ):
        text = (CHECKOUTS / f"{folder}{file}_prompter.py").read_text()
        space = dict(base)
        exec(re.sub(r"^(from|import) .*$", "", text, flags=re.M).replace("Optional[str]", "str"), space)
        builders[name] = space[kind]
        base = base if "PromptBuilder" in base else base | {"PromptBuilder": space["PromptBuilder"]}
    text = (CHECKOUTS / "prismatic-vlms/prismatic/preprocessing/datasets/datasets.py").read_text()
    text = re.sub(r"^from prismatic.*$", "", text, flags=re.M)
    read = types.ModuleType("read")
    sys.modules["read"] = read
    read.PromptBuilder = read.ImageTransform = object
    exec("from typing import *\n" + text, read.__dict__)
    blank = types.SimpleNamespace(open=lambda path: types.SimpleNamespace(convert=lambda mode: None))
    read.Image = blank
    found = {}
    tokenizer = llama(True, slow=False)
    assert isinstance(tokenizer, transformers.LlamaTokenizerFast)
    for name, builder in builders.items():
        rows = []
        for sample in corpus.conversations(FEW):
            if builder is None and "image" not in sample:
                continue
            kind = read.AlignDataset if builder is None else read.FinetuneDataset
            dataset = object.__new__(kind)
            turns = sample["conversations"][:2] if builder is None else sample["conversations"]
            dataset.examples = [sample | {"conversations": turns}]
            dataset.image_dir, dataset.image_transform, dataset.tokenizer = Path(), lambda image: None, tokenizer
            dataset.prompt_builder_fn, dataset.prompt_template = builder, "{caption}" + tokenizer.eos_token
            out = dataset[0]
            ids, labels = out["input_ids"].tolist(), out["labels"].tolist()
            at = 1 if "image" in sample else 0  # the model puts the patches behind the begin mark
            rows.append(row(ids[:at] + [IMAGE] * at + ids[at:], labels[:at] + [IGNORED] * at + labels[at:]))
        found[name] = rows
    return found


def honeybee() -> dict:
    constants = module("honeybee/pipeline/data_utils/constants.py")
    known = {key: value for key, value in vars(constants).items() if key.isupper()}
    tokens = taken(
        "honeybee/honeybee/tokenization_honeybee.py", ("HoneybeeTokenizerMixin", "extend_instance_", "_pad_trunc"),
        re=re, torch=torch, _AI="\n" + known["AI"], _HUMAN="\n" + known["HUMAN"], _INFINITE=int(1e12), **known,
    )  # fmt: skip
    common = taken(
        "honeybee/pipeline/data_utils/datasets/common.py",
        ("chunking_by_keyword", "remove_special_token_from_text"), re=re, MEDIA_TOKENS=known["MEDIA_TOKENS"],
    )  # fmt: skip
    import os

    reader = taken(
        "honeybee/pipeline/data_utils/datasets/llava_dataset.py", ("LLaVAInstructDataset",), BaseDataset=object, os=os,
        **vars(common), **known,
    ).LLaVAInstructDataset  # fmt: skip
    tokenizer = llama(True)
    tokens.extend_instance_(tokenizer, tokens.HoneybeeTokenizerMixin)
    tokenizer.mllm_setup(1)
    found = {}
    for name, as_instruct in (("chat", True), ("caption", False)):
        dataset = object.__new__(reader)
        dataset.as_instruct, dataset.image_tokens = as_instruct, ["<image>\n", "\n<image>"]
        rows = []
        for sample in corpus.conversations(FEW):
            if "image" not in sample:
                continue
            (parsed,) = dataset.load_data([sample], "", known["SYSTEM_MESSAGE"])
            out = tokenizer.encode_prompt(parsed["text"], None)
            ids = [IMAGE if i == -1 else i for i in out["input_ids"].tolist()]
            rows.append(row(ids, out["labels"].tolist()))
        found[name] = rows
    return found


def strings() -> dict:
    """Ids of varied strings by sentencepiece and by both kinds of LlamaTokenizer."""
    texts = [
        "",
        " ",
        "  ",
        "\n",
        " a",
        "a ",
        "  a  b ",
        "\n\nUSER",
        "▁",
        "<0x0A>",
        "aaaaaaa",
        "\x00",
        "</s>a b</s> c<s>",
    ]
    for sample in corpus.conversations(100, seed=3):
        texts += [turn["value"].replace("<image>", "") for turn in sample["conversations"]]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "tokenizer.model"))
    found = {"texts": texts, "sentencepiece": [processor.encode(text) for text in texts]}
    for legacy in (True, False):
        slow = llama(legacy)
        found["legacy" if legacy else "new"] = [slow(text, add_special_tokens=False).input_ids for text in texts]
    return found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    train_tokenizers()
    made = {"llava": llava(), "next": next_(), "nano": nano(), "prismatic": prismatic(), "honeybee": honeybee()}
    made["strings"] = strings()
    text = json.dumps(made, separators=(",", ":"))
    (HERE / "golden.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    for name, rows in made["llava"].items():
        print(name, *([rows] if isinstance(rows, str) else ["warned about", sum("warned" in row for row in rows)]))

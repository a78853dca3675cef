"""Small files of every benchmark's published schema, their images, and a tiny run that can answer them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tcjax.compressors import avg_pool
from tcjax.config import DataConfig, Run, Source, TrainConfig
from tcjax.record import to_dict, write_json
from tcjax.vlm import VlmConfig
from tests.tiny import LLM, TOWER

SPECIALS = ("<bos>", "<image>", "<user>", "<assistant>", "<end>", "<pad>")
TEN = [f"answer {i}" for i in range(6)] + ["red"] * 4


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 255, (20, 24, 3)).astype(np.uint8)
    Image.fromarray(colours).save(path)


def vqav2(root: Path) -> Path:
    questions, annotations = [], []
    for i in range(6):
        questions.append({"image_id": 9 + i // 2, "question": f"What is {i}?", "question_id": 100 + i})
        given = [{"answer": text, "answer_confidence": "yes", "answer_id": k} for k, text in enumerate(TEN)]
        kind = {"question_type": "what is", "answer_type": ("yes/no", "number", "other")[i % 3]}
        annotations.append(
            kind | {"question_id": 100 + i, "image_id": 9 + i // 2, "multiple_choice_answer": "red", "answers": given}
        )
    about = {"info": {}, "license": {}, "data_subtype": "val2014", "data_type": "mscoco"}
    write(root / "v2_OpenEnded_mscoco_val2014_questions.json", about | {"task_type": "x", "questions": questions})
    write(root / "v2_mscoco_val2014_annotations.json", about | {"annotations": annotations})
    write(root / "v2_OpenEnded_mscoco_test2015_questions.json", about | {"task_type": "x", "questions": questions})
    for i in range(3):
        picture(root / f"val2014/COCO_val2014_{9 + i:012d}.jpg", i)
        picture(root / f"COCO_test2015_{9 + i:012d}.jpg", i)
    return root


def gqa(root: Path) -> Path:
    questions = {}
    for i in range(6):
        questions[f"07{i}"] = {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "dog (1)"}],
            "entailed": [f"07{(i + 1) % 6}", f"07{i}", "99999"],
            "equivalent": [f"07{i}"],
            "question": f"Is it {i}?",
            "imageId": f"n{i // 2}",
            "isBalanced": True,
            "groups": {"global": "colour" if i % 2 else None, "local": "06-dog"},
            "answer": "yes" if i % 2 else "red",
            "fullAnswer": "Yes, it is.",
            "semanticStr": "select: dog (1)",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "existC", "semantic": "obj", "structural": "verify" if i % 2 else "query"},
        }
    write(root / "testdev_balanced_questions.json", questions)
    for i in range(3):
        picture(root / f"images/n{i}.jpg", i)
    return root


def textvqa(root: Path) -> Path:
    data = []
    for i in range(4):
        data.append(
            {
                "question": f"what is the brand {i}?",
                "question_id": 34602 + i,
                "image_id": f"003a{i // 2}",
                "image_classes": ["Camera"],
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "image_width": 24,
                "image_height": 20,
                "answers": TEN,
                "question_tokens": ["what"],
                "set_name": "val",
            }
        )
    about = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write(root / "TextVQA_0.5.1_val.json", about | {"data": data})
    ocr = [{"image_id": f"003a{i}", "ocr_tokens": ["DAKOTA", f"{i}"], "ocr_info": []} for i in range(2)]
    write(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"dataset_name": "textvqa", "data": ocr})
    for i in range(2):
        picture(root / f"train_images/003a{i}.jpg", i)
    return root


def docvqa(root: Path) -> Path:
    data = []
    for i in range(4):
        item = {"questionId": 49153 + i, "question": f"What is the date {i}?", "question_types": ["layout"]}
        item |= {"image": f"documents/pyb{i // 2}.png", "docId": 14465, "ucsf_document_id": "pyb"}
        data.append(item | {"ucsf_document_page_no": "81", "answers": ["1/8/93", "1 8 93"], "data_split": "val"})
    write(
        root / "val_v1.0.json",
        {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val", "data": data},
    )
    for i in range(2):
        picture(root / f"documents/pyb{i}.png", i)
    return root


def pope(root: Path) -> Path:
    for kind in ("random", "popular", "adversarial"):
        lines = []
        for i in range(6):
            line = {"question_id": i + 1, "image": f"COCO_val2014_{i // 6:012d}.jpg"}
            lines.append(
                json.dumps(line | {"text": f"Is there a thing {i} in the image?", "label": ("yes", "no")[i % 2]})
            )
        write(root / f"coco/coco_pope_{kind}.json", "\n".join(lines) + "\n")
    picture(root / f"val2014/COCO_val2014_{0:012d}.jpg", 0)
    return root


def mme(root: Path) -> Path:
    from tcjax.evaluate.suites.mme import COGNITION, PERCEPTION

    for subtask in PERCEPTION + COGNITION:
        lines = []
        for i in range(2):
            for truth in ("Yes", "No"):
                lines.append(f"{i:04d}.jpg\tIs it {i} or {truth}? Please answer yes or no.\t{truth}")
            folder = root / subtask / "images" if subtask == "artwork" else root / subtask
            picture(folder / f"{i:04d}.jpg", i)
        write(root / f"Your_Results/{subtask}.txt", "\n".join(lines) + "\n")
    return root


def coco(root: Path) -> Path:
    images = []
    for i in range(4):
        sentences = [
            {"tokens": ["a", "dog"], "raw": f"A dog number {i} runs {k}.", "imgid": i, "sentid": k} for k in range(5)
        ]
        item = {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{i:012d}.jpg",
            "cocoid": i,
            "imgid": i,
            "sentids": [i],
        }
        images.append(item | {"split": "test" if i < 3 else "train", "sentences": sentences})
        picture(root / f"val2014/COCO_val2014_{i:012d}.jpg", i)
    write(root / "dataset_coco.json", {"images": images, "dataset": "coco"})
    listed = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg", "height": 20, "width": 24} for i in range(3)]
    said = [{"id": k, "image_id": k % 3, "caption": f"A dog {k} runs."} for k in range(15)]
    write(
        root / "annotations/captions_val2014.json", {"info": {}, "licenses": [], "images": listed, "annotations": said}
    )
    return root


def scienceqa(root: Path) -> Path:
    problems = {}
    for i in range(4):
        problem = {"question": f"Which is {i}?", "choices": ["a cat", "a dog", "a bee"][: 2 + i % 2], "answer": i % 2}
        problem |= {
            "hint": "Look closely." if i % 2 else "",
            "image": "image.png" if i < 3 else None,
            "task": "closed choice",
        }
        problem |= {"grade": f"grade{3 + 2 * i}", "subject": "natural science", "topic": "biology", "category": "x"}
        problems[str(i + 1)] = problem | {"skill": "x", "lecture": "", "solution": "", "split": "test"}
        if i < 3:
            picture(root / f"images/test/{i + 1}/image.png", i)
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", {"train": [], "val": [], "test": ["1", "2", "3", "4"], "minitest": ["1"]})
    return root


def cub(root: Path) -> Path:
    names = ["001.Black_footed_Albatross", "002.Crow", "003.Fish_Crow"]
    write(root / "classes.txt", "".join(f"{i + 1} {name}\n" for i, name in enumerate(names)))
    paths = [f"{names[i % 3]}/bird_{i}.jpg" for i in range(5)]
    write(root / "images.txt", "".join(f"{i + 1} {path}\n" for i, path in enumerate(paths)))
    write(root / "image_class_labels.txt", "".join(f"{i + 1} {i % 3 + 1}\n" for i in range(5)))
    write(root / "train_test_split.txt", "".join(f"{i + 1} {int(i == 4)}\n" for i in range(5)))
    write(root / "bounding_boxes.txt", "".join(f"{i + 1} 1.0 2.0 3.0 4.0\n" for i in range(5)))
    for i, path in enumerate(paths):
        picture(root / "images" / path, i)
    return root


FILES = {
    "vqav2": vqav2,
    "gqa": gqa,
    "textvqa": textvqa,
    "docvqa": docvqa,
    "pope": pope,
    "mme": mme,
    "coco": coco,
    "scienceqa": scienceqa,
    "cub": cub,
}


def images_of(name: str, root: Path) -> Path:
    return root / "images" if name == "scienceqa" else root


def byte_tokenizer() -> Tokenizer:
    """A token per byte, so that it knows every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate((*SPECIALS, *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def tiny_run(root: Path, name: str = "run", seed: int = 0) -> Path:
    """A run's folder of 0 steps: a random VLM of width 16 that says something of every prompt."""
    import dataclasses

    (root / "configs").mkdir(exist_ok=True)
    byte_tokenizer().save(str(root / "tokenizer.json"))
    llm = dataclasses.replace(LLM, vocab=len(SPECIALS) + 256)
    run = Run(
        name=name,
        model=VlmConfig(tower=TOWER, compressor=avg_pool.Config(num_queries=4), llm=llm),
        data=DataConfig(sources=(Source(path="none"),), tokenizer="tokenizer.json"),
        train=TrainConfig(steps=0, seed=seed),
    )
    write_json(root / name / "run.json", to_dict(run))
    return root / name

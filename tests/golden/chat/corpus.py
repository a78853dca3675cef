"""The conversations and the small tokenizers of the golden files: a pure function of the seed, standard library only."""

import random

WORDS = (
    "a an the of in on is are was what which how many where this that image picture photo person man woman dog cat street "
    "car red blue green small large left right behind front table wooden chair standing sitting holding near and with from "
    "two three bus train stop sign kitchen window sky clouds people walking young old white black yellow bowl fruit apple "
    "answer question using single word phrase describe briefly yes no visible background conversation helpful detailed"
).split()
ODD = (
    "naïve café",
    "東京タワー",
    "Größe 12,5 €",
    "🙂👍🏽",
    "x  =  3",
    "tab\there",
    "a▁b",
    "e\u0301",
    "العربية",
    "1.\n2.\n\n3.",
    "C:\\dir",
)
MARKS = ("USER:", "ASSISTANT:", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "In:", "Out:", "Human:", "AI:")


def sentence(random_: random.Random, longest: int = 12) -> str:
    words = [random_.choice(WORDS) for _ in range(random_.randint(1, longest))]
    if random_.random() < 0.25:
        words.insert(random_.randrange(len(words) + 1), random_.choice(ODD))
    text = " ".join(words)
    return text[:1].upper() + text[1:] + random_.choice((".", "?", "", "!", ")"))


def conversations(num: int, seed: int = 0) -> list[dict]:
    """LLaVA's records without ids: {"image": ..., "conversations": [{"from", "value"}, ...]}."""
    random_, found = random.Random(seed), []
    for i in range(num):
        turns = []
        has_image = i % 5 != 4
        for turn in range(random_.choice((1, 1, 2, 3, 4))):
            question, answer = sentence(random_), sentence(random_, 20)
            if has_image and turn == 0:
                question = f"<image>\n{question}" if i % 2 else f"{question}\n<image>"
            if i % 11 == 3:
                answer = random_.choice(("\n", "\n\n")) + answer + random_.choice(("", "\n"))
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        found.append(({"image": "a.jpg"} if has_image else {}) | {"conversations": turns})
    return found


def several(num: int, seed: int = 5) -> list[dict]:
    """Conversations that show an image in every turn."""
    random_, found = random.Random(seed), []
    for _ in range(num):
        turns = []
        for _ in range(random_.choice((2, 3))):
            question = f"<image>\n{sentence(random_)}" if random_.random() < 0.5 else f"{sentence(random_)}\n<image>"
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": sentence(random_)}]
        found.append({"image": "a.jpg", "conversations": turns})
    return found


def lines(seed: int = 1) -> list[str]:
    """What the tokenizers are trained on. "USER" is often inside a word and "US" often begins one, as in Llama's own
    corpus: there " USER" is two pieces and "USER" behind an end mark is one, which LLaVA's mask relies on."""
    random_ = random.Random(seed)
    made = [sentence(random_, 30) for _ in range(600)]
    made += [f"({mark} {sentence(random_)}" for mark in MARKS for _ in range(30)]
    made += [f"{sentence(random_)} {mark} {sentence(random_)}" for mark in MARKS[1:] for _ in range(30)]
    made += ["(USER:(USER:(USER:"] * 200 + ["US US US US US US"] * 400
    return [line.replace("\n", " ") for line in made]  # a newline is a byte, as in Llama's vocabulary

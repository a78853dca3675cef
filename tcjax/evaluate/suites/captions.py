"""Scores of captions against several references each: CIDEr-D, BLEU-1 to 4, ROUGE-L; all on text that is tokenised already.

    CIDEr-D   n-grams of n = 1..4 weigh tf (ln M - ln max(1, df)), M images, df those whose references hold the n-gram.
              Per n: sum min(h, r) r / (|h| |r|) exp(-delta^2 / 72), delta the difference of the numbers of bigrams;
              mean over n, mean over references, x 10. One image alone scores 0
    BLEU      clipped n-gram precision over the corpus, geometric mean, brevity by the closest reference length
    ROUGE-L   F with beta = 1.2 of the best precision and the best recall over references, by longest common subsequence

Sources: Vedantam et al. 2015, Papineni et al. 2002, Lin 2004; equal to pycocoevalcap's to 1e-9 in tests/test_captions.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

ORDERS = 4
_SIGMA, _BETA = 6.0, 1.2
_SMALL, _TINY = 1e-9, 1e-15  # as the original: a caption without an n-gram scores 0 and divides nothing by 0

Words = Sequence[str]


class BleuCounts(NamedTuple):
    """What a caption adds to the corpus: right and said n-grams per order, its length, the closest reference's."""

    right: tuple[int, ...]
    said: tuple[int, ...]
    length: int
    reference: int


def ngrams(words: Words) -> Counter:
    """{n-gram: how often}, n = 1..4."""
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Per image, 10 at most as a rule; the corpus scores their mean."""
    seen: Counter = Counter()
    for some in references:
        seen.update(set().union(*(ngrams(words) for words in some)))
    log_images = math.log(len(captions))

    def weigh(words: Words) -> tuple[list[dict], list[float], int]:
        vectors: list[dict] = [{} for _ in range(ORDERS)]
        for ngram, count in ngrams(words).items():
            vectors[len(ngram) - 1][ngram] = count * (log_images - math.log(max(1.0, seen[ngram])))
        norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
        return vectors, norms, max(len(words) - 1, 0)

    scores = []
    for caption, some in zip(captions, references, strict=True):
        hyp, hyp_norms, hyp_length = weigh(caption)
        total = 0.0
        for reference in some:
            ref, ref_norms, ref_length = weigh(reference)
            penalty = math.exp(-((hyp_length - ref_length) ** 2) / (2 * _SIGMA**2))
            for n in range(ORDERS):
                norm = hyp_norms[n] * ref_norms[n]
                shared = sum(
                    min(weight, ref[n].get(ngram, 0.0)) * ref[n].get(ngram, 0.0) for ngram, weight in hyp[n].items()
                )
                total += (shared / norm if norm else shared) * penalty
        scores.append(10 * total / ORDERS / len(some))
    return scores


def bleu_counts(caption: Words, references: Sequence[Words]) -> BleuCounts:
    allowed: Counter = Counter()
    for reference in references:
        allowed |= ngrams(reference)
    right = [0] * ORDERS
    for ngram, count in ngrams(caption).items():
        right[len(ngram) - 1] += min(count, allowed[ngram])
    said = tuple(max(0, len(caption) - n) for n in range(ORDERS))
    closest = min((abs(len(reference) - len(caption)), len(reference)) for reference in references)[1]
    return BleuCounts(tuple(right), said, len(caption), closest)


def bleu(counts: BleuCounts) -> list[float]:
    """BLEU-1 to 4 of counts, a caption's own or a corpus's sum."""
    product, scores = 1.0, []
    ratio = (counts.length + _TINY) / (counts.reference + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    for n in range(ORDERS):
        product *= (counts.right[n] + _TINY) / (counts.said[n] + _SMALL)
        scores.append(product ** (1 / (n + 1)) * brevity)
    return scores


def rouge_l(caption: Words, references: Sequence[Words]) -> float:
    said = list(caption) or [""]  # the original splits "" into one empty word
    common = [(_common(said, list(words) or [""]), max(len(words), 1)) for words in references]
    precision = max(length for length, _ in common) / len(said)
    recall = max(length / size for length, size in common)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(b) + 1)
    for word in a:
        here = [0]
        for j, other in enumerate(b, 1):
            here.append(before[j - 1] + 1 if word == other else max(before[j], here[-1]))
        before = here
    return before[-1]

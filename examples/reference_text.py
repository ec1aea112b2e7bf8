"""The data of the examples: the Python reference, which ships with every Python. Nothing is downloaded."""

import re
from collections import Counter
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.utils.data import Dataset

PAD, UNKNOWN, CLS, SEP = range(4)


class ByteWindows(Dataset[dict[str, Tensor]]):
    """Sequences of the text's bytes for language models.

    Parameters
    ----------
    count
        How many sequences; beyond the end of the text they begin again, at other places.
    length
        Bytes in each.
    """

    vocab_size = 256

    def __init__(self, count: int, length: int) -> None:
        text = "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._count = count
        self._length = length

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self._length % (len(self._bytes) - self._length)
        tokens = self._bytes[start : start + self._length].long()
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


class TopicSentences(Dataset[dict[str, Tensor]]):
    """Sentences to classify, one task in the form of GLUE's: is it about compound statements (0) or strings (1)?

    Parameters
    ----------
    split
        ``"train"``: four of five sentences. ``"test"``: the others.
    length
        Words in each, padded or cut.
    vocab_size
        The most frequent words have numbers of their own, the others share one.
    """

    num_labels = 2
    _topics = (("compound",), ("formatstrings", "string-methods"))

    def __init__(self, split: str, length: int = 48, vocab_size: int = 2000) -> None:
        labelled = [
            (words, label)
            for label, names in enumerate(self._topics)
            for name in names
            for words in _sentences(topics[name])
        ]
        frequent = Counter(word for words, _ in labelled for word in words).most_common(vocab_size - 4)
        numbers = {word: number for number, (word, _) in enumerate(frequent, start=4)}
        chosen = [each for place, each in enumerate(labelled) if (place % 5 == 4) == (split == "test")]
        self._rows = [_encoded([numbers.get(word, UNKNOWN) for word in words], length) for words, _ in chosen]
        self._labels = [label for _, label in chosen]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.tensor(self._rows[index])
        return {
            "input_ids": tokens,
            "token_type_ids": torch.zeros_like(tokens),
            "attention_mask": (tokens != PAD).long(),
            "labels": torch.tensor(self._labels[index]),
        }


def _sentences(text: str) -> list[list[str]]:
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [words for sentence in sentences if len(words := re.findall(r"\w+|[^\w\s]", sentence.lower())) > 4]


def _encoded(words: list[int], length: int) -> list[int]:
    row = [CLS, *words[: length - 2], SEP]
    return row + [PAD] * (length - len(row))

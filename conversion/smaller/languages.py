"""
In what the tasks are told: sentences of a tokenizer, or bare token ids for a model that has none.

Tasks say templates with fields, such as `" The code of the {name} is {value}."`. A language makes what is put into the
fields, turns templates into ids, and fills the room between. What it turns into ids at a time begins with a space, a
line or a mark, so that tokenizers which cut words there give the ids of the whole text.
"""

import random
import re
import string
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..files.errors import ConversionError


COLOURS = "amber black blue bronze brown copper coral crimson golden green grey ivory olive orange pink purple red silver white yellow"
ANIMALS = "badger beaver camel crane dolphin eagle falcon fox goat heron horse lion otter owl panda rabbit raven seal tiger wolf"
# Of which filler is made, without names and numbers of the tasks.
SUBJECTS = (
    "A neighbour|A teacher|My brother|My sister|Our gardener|The baker|The children|The doctor|The driver|The painter"
)
VERBS = "brought|cleaned|counted|described|found|kept|looked at|moved|painted|repaired|returned|sold|wanted"
OBJECTS = (
    "a basket|a chair|a letter|an old clock|some bread|the boat|the bridge|the fence|the garden|the lamp|the window"
)
PLACES = "after lunch|at the station|before winter|behind the house|in the morning|near the river|on the hill|without a word"
READ = 2**22  # characters of a text, from which filler is taken

Value = str | tuple[int, ...]  # of sentences, and of bare ids


class Sentences:
    """English, in the ids of a tokenizer; a text, or else sentences by chance, fills the room."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None = None):
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}
        self.sentences = (
            None if text is None else [s for s in re.split(r"(?<=[.!?])\s+|\n+", text[:READ]) if s.strip()]
        )
        # Texts to go on with, without a chat template: in a chat, models talk about the code where they could say it.
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
        self.head = [bos] * begins
        self.tail = self.encode("\n")

    def encode(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(self.known[text])

    def say(self, template: str, **fields: str) -> list[int]:
        """The ids of a template."""
        return self.encode(template.format(**fields))

    def part_found(self, values: list[str], ids: list[int]) -> float:
        """The part of the values that the ids say, each standing by itself."""
        text = self.tokenizer.decode(ids)
        return sum(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None for value in values) / len(values)

    def names(self, generator: random.Random, count: int) -> list[str]:
        pairs = [f"{colour} {animal}" for colour in COLOURS.split() for animal in ANIMALS.split()]
        return generator.sample(pairs, count)

    def values(self, generator: random.Random, count: int) -> list[str]:
        return [str(value) for value in generator.sample(range(10_000, 100_000), count)]

    def words(self, generator: random.Random, count: int) -> list[str]:
        """Words among which none follows from those before."""
        return generator.sample(COLOURS.split() + ANIMALS.split(), count)

    def fill(self, generator: random.Random, count: int) -> list[list[int]]:
        """`count` ids, in pieces between which a fact may stand."""
        pieces, place = [], generator.randrange(len(self.sentences)) if self.sentences else 0
        while count > 0:
            if self.sentences:
                sentence = " ".join(self.sentences[place % len(self.sentences)].split())
                place += 1
            else:
                sentence = (
                    " ".join(generator.choice(part.split("|")) for part in (SUBJECTS, VERBS, OBJECTS, PLACES)) + "."
                )
            piece = self.encode(" " + sentence)[:count]
            if not piece:  # of a sentence that the tokenizer drops, there may be no other
                piece = self.encode(" the")[:count]
            pieces.append(piece)
            count -= len(piece)
        return pieces


class Tokens:
    """Bare ids: names, values and filler are different ids, and of a template only its fields are said."""

    def __init__(self, vocab_size: int):
        if vocab_size < 64:
            raise ConversionError(f"vocab_size={vocab_size}: expected at least 64 for tasks of bare token ids")
        third = vocab_size // 3
        self.head, self.tail = [], []
        self.kinds = [range(1, third), range(third, 2 * third), range(2 * third, vocab_size)]

    def say(self, template: str, **fields: Sequence[int]) -> list[int]:
        return [token for _, name, _, _ in string.Formatter().parse(template) if name for token in fields[name]]

    def part_found(self, values: list[tuple[int, ...]], ids: list[int]) -> float:
        """The part of the values that the ids say."""
        said = {tuple(ids[i : i + len(value)]) for value in values for i in range(len(ids))}
        return sum(value in said for value in values) / len(values)

    def names(self, generator: random.Random, count: int) -> list[tuple[int, ...]]:
        return [(token,) for token in generator.sample(self.kinds[0], count)]

    def values(self, generator: random.Random, count: int) -> list[tuple[int, ...]]:
        tokens = generator.sample(self.kinds[1], 3 * count)
        return [tuple(tokens[start : start + 3]) for start in range(0, 3 * count, 3)]

    def words(self, generator: random.Random, count: int) -> list[tuple[int, ...]]:
        return [(token,) for token in generator.sample(self.kinds[1], count)]

    def fill(self, generator: random.Random, count: int) -> list[list[int]]:
        return [[token] for token in generator.choices(self.kinds[2], k=count)]


Language = Sentences | Tokens


def find_language(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, text: str | None = None) -> Language:
    """Sentences, or ids for a model without a tokenizer, or with one that cannot write the numbers of the tasks."""
    if tokenizer is not None:
        ids = tokenizer("code 30517", add_special_tokens=False)["input_ids"]
        if "30517" in tokenizer.decode(ids):
            return Sentences(tokenizer, text)
    return Tokens(vocab_size)

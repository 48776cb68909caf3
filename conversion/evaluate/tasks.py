"""
Questions that can only be answered by reading a long text, in the manner of RULER (arXiv 2404.06654).

Facts stand in filler at evenly spread depths: the first fact of sample i of n at (i + 1/2) / n of the text, k facts at steps of 1/k
from there, modulo the length. Values are random, so that no question helps to guess them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from ..files.errors import ConversionError
from ..smaller.languages import Language, Value


FACTS = 4  # of tasks with several
COPIED = (4, 8)  # words of a passage that the question repeats, and that are asked for
INTRODUCTION = " Remember what this text says, for you will be asked for a part of it.\n\n"


class TooShort(ConversionError):
    """A length does not hold a task."""


@dataclass
class Sample:
    """
    Attributes:
        prompt: ids, all of the same number for samples of one task and length.
        answer: the ids that are to follow.
        values: what is looked for in what a model says: each number or word of the answer.
        depth: where the first fact that the answer needs stands, as a part of the text.
        places: where in the prompt the facts begin that the answer is read from.
    """

    prompt: list[int]
    answer: list[int]
    values: list[Value]
    depth: float
    places: list[int]


@dataclass
class Parts:
    """
    What a sample is made of: facts in the order of the text, each with whether the answer is read from it; then the
    question, the beginning of an answer, the rest of it, and the values that the rest tells.
    """

    facts: list[tuple[float, list[int], bool]]
    question: list[int]
    beginning: list[int]
    answer: list[int]
    values: list[Value]


def depths(depth: float, count: int) -> list[float]:
    return [(depth + step / count) % 1 for step in range(count)]


CODE = " The secret code of the {name} is {value}."
QUESTION = "\n\nWhat is the secret code of the {name}?"
BEGINNING = "The secret code of the {name} is"


def make_needle(language: Language, generator: random.Random, depth: float, others: int = 0) -> Parts:
    """One code is asked for, of the one that is there, or beside `others`."""
    names, values = language.names(generator, 1 + others), language.values(generator, 1 + others)
    facts = [
        (place, language.say(CODE, name=name, value=value), name is names[0])
        for place, name, value in zip(depths(depth, 1 + others), names, values)
    ]
    return Parts(
        facts, language.say(QUESTION, name=names[0]), language.say(BEGINNING, name=names[0]),
        language.say(" {value}", value=values[0]), values[:1],
    )  # fmt: skip


def make_keys(language: Language, generator: random.Random, depth: float) -> Parts:
    return make_needle(language, generator, depth, FACTS - 1)


def make_values(language: Language, generator: random.Random, depth: float) -> Parts:
    """All codes of one name are asked for, in their order."""
    (name,), values = language.names(generator, 1), language.values(generator, FACTS)
    facts = [
        (place, language.say(" One of the secret codes of the {name} is {value}.", name=name, value=value), True)
        for place, value in zip(sorted(depths(depth, FACTS)), values)
    ]
    question = "\n\nWhat are all the secret codes of the {name}, in the order of the text?"
    fields = {f"v{index}": value for index, value in enumerate(values)}
    return Parts(
        facts, language.say(question, name=name),
        language.say("The secret codes of the {name}, in the order of the text, are", name=name),
        language.say(",".join(f" {{{field}}}" for field in fields), **fields), values,
    )  # fmt: skip


def make_variables(language: Language, generator: random.Random, depth: float) -> Parts:
    """A value that is handed on from name to name; asked for is that of the last."""
    names, values = language.names(generator, FACTS), language.values(generator, 1)
    told = [language.say(" The box of the {name} holds {value}.", name=names[0], value=values[0])]
    told += [
        language.say(" The box of the {name} holds the same as the box of the {other}.", name=name, other=other)
        for other, name in zip(names, names[1:])
    ]
    facts = [(place, ids, True) for place, ids in zip(sorted(depths(depth, FACTS)), told)]
    return Parts(
        facts, language.say("\n\nWhat number does the box of the {name} hold?", name=names[-1]),
        language.say("The box of the {name} holds", name=names[-1]), language.say(" {value}", value=values[0]), values,
    )  # fmt: skip


def make_copying(language: Language, generator: random.Random, depth: float) -> Parts:
    """A passage of random words goes on as it did before."""
    given, asked = COPIED
    listed = language.words(generator, given + asked)
    fields = {f"w{index}": word for index, word in enumerate(listed)}
    words = [f" {{{field}}}" for field in fields]
    return Parts(
        [(depth, language.say(f" List:{''.join(words)}.", **fields), True)],
        language.say("\n\nRepeat the list of the text."),
        language.say(f"List:{''.join(words[:given])}", **fields),
        language.say("".join(words[given:]), **fields),
        listed[given:],
    )


TASKS: dict[str, Callable[[Language, random.Random, float], Parts]] = {
    "needle": make_needle,
    "keys": make_keys,
    "values": make_values,
    "variables": make_variables,
    "copying": make_copying,
}


def make_samples(language: Language, task: str, length: int, count: int, seed: int = 0) -> list[Sample]:
    """
    `count` samples of one task; each prompt, with the longest of their answers, takes `length` tokens.

    Raises:
        TooShort: if so few tokens do not hold it.
    """
    generator = random.Random(f"{seed} {task} {length}")
    all_parts = [TASKS[task](language, generator, (index + 0.5) / count) for index in range(count)]
    room = length - max(len(parts.answer) for parts in all_parts)
    samples = []
    for index, parts in enumerate(all_parts):
        before = language.head + language.say(INTRODUCTION)
        after = parts.question + language.tail + parts.beginning
        fixed = len(before) + sum(len(ids) for _, ids, _ in parts.facts) + len(after)
        if fixed > room:
            raise TooShort(f"--lengths {length}: task {task} needs at least {length - room + fixed} tokens")
        prompt, places = list(before), []
        facts = sorted(parts.facts, key=lambda fact: fact[0])
        filler, done = room - fixed, 0
        for piece in [*language.fill(generator, filler), []]:
            # A fact stands before the piece in which its depth is, or at the end.
            while facts and (facts[0][0] * filler < done + len(piece) or not piece):
                _, ids, needed = facts.pop(0)
                if needed:
                    places.append(len(prompt))
                prompt += ids
            prompt += piece
            done += len(piece)
        samples.append(Sample(prompt + after, parts.answer, parts.values, (index + 0.5) / count, places))
    return samples

"""
Text that only who finds its facts again can predict. Of ordinary text a model predicts most without looking far back, so that a
calibration on it alone says nothing of the keys by which facts are found. Sentences, names and values are others than those of
`conversion.evaluate`, which is to measure something new.
"""

import random
from dataclasses import dataclass

import torch

from .languages import Language, Sentences, Value


INTRODUCTION = " Read the notes, then answer the questions.\n\n"
# A fact, the question for it, and the beginning of the answer, which the value ends.
FORMS = (
    (" The locker of {name} has the number {value}.", "Which number has the locker of {name}?", "The number is"),
    (" {name} was last seen in {value}.", "Where was {name} last seen?", "{name} was last seen in"),
    (" To open {name}, say {value}.", "What opens {name}?", "To open {name}, say"),
    (" The price of {name} is {value} dollars.", "What is the price of {name}?", "The price of {name} is"),
    (" The friends of {name} are {value}.", "Who are the friends of {name}?", "The friends of {name} are"),
)
FILLER = 0.4  # the least part of a window that is neither fact nor question
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass
class Questions:
    """
    Attributes:
        ids: windows [n, length]: filler with facts in it, then questions and their answers.
        asked: bool [n, length], which tokens are those of the answers.
    """

    ids: torch.Tensor
    asked: torch.Tensor

    def to(self, device: str | torch.device) -> "Questions":
        return Questions(self.ids.to(device), self.asked.to(device))


def made_up_word(generator: random.Random) -> str:
    syllables = range(generator.randint(2, 3))
    return "".join(generator.choice(CONSONANTS) + generator.choice(VOWELS) for _ in syllables).capitalize()


def name_and_value(language: Language, generator: random.Random) -> tuple[Value, Value]:
    if not isinstance(language, Sentences):
        return language.names(generator, 1)[0], language.values(generator, 1)[0]
    name = made_up_word(generator)
    if generator.random() < 0.5:
        return name, str(generator.randrange(100, 1_000_000))
    return name, " ".join(made_up_word(generator) for _ in range(generator.randint(1, 3)))


def make_questions(language: Language, length: int, count: int, seed: int = 0) -> Questions:
    """`count` windows of `length` tokens."""
    windows, marks = [], []
    for index in range(count):
        generator = random.Random(f"questions {seed} {index}")
        start = language.head + language.say(INTRODUCTION)
        room, facts, asked = int((1 - FILLER) * length) - len(start), [], []
        while True:
            name, value = name_and_value(language, generator)
            fact, question, beginning = (language.say(s, name=name, value=value) for s in generator.choice(FORMS))
            question = language.say("\n\n") + question
            answer = language.say(" {value}", value=value)
            room -= len(fact) + len(question) + len(language.tail) + len(beginning) + len(answer)
            if room < 0 and facts:
                break
            facts.append(fact)
            asked.append((question, beginning, answer))
        ids, mark = list(start), []
        end, answers = [], []
        for question, beginning, answer in generator.sample(asked, len(asked)):
            end += question + language.tail + beginning
            answers += [False] * (len(end) - len(answers)) + [True] * len(answer)
            end += answer
        filler = language.fill(generator, max(0, length - len(start) - sum(map(len, facts)) - len(end)))
        places = sorted(generator.randrange(len(filler) + 1) for _ in facts)
        for place, piece in enumerate([*filler, []]):
            while places and places[0] == place:
                places.pop(0)
                ids += facts[len(places)]
            ids += piece
        mark = [False] * len(ids) + answers
        ids += end
        windows.append(ids[-length:])
        marks.append(mark[-length:])
    ids, asked = torch.tensor(windows, dtype=torch.long), torch.tensor(marks, dtype=torch.bool)
    return Questions(ids.view(-1, length), asked.view(-1, length))

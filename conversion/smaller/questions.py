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
# A fact that is told with one value after another, the question for all of them, and the beginning of the answer.
REPEATED_FORMS = (
    (" {name} has bought {value}.", "What has {name} bought, first to last?", "{name} has bought"),
    (" The guests of {name} were joined by {value}.", "Who were the guests of {name}?", "The guests of {name} were"),
    (" On the way {name} met {value}.", "Whom did {name} meet on the way?", "On the way {name} met"),
)
# A fact, one that says the same of another name, the question, and the beginning of the answer.
CHAINED_FORMS = (
    (" {name} will travel to {value}.", " {name} will travel with {other}.", "Where will {name} be?", "{name} will be in"),
    (" The wage of {name} is {value}.", " {name} earns what {other} earns.", "What is the wage of {name}?", "The wage is"),
)  # fmt: skip
AGAIN = "What went on after these words?"  # of a passage, after whose beginning it goes on as before
REPEATED, CHAINED = (2, 4), (2, 4)  # values of a name, names in a chain
PASSAGE, GIVEN = 16, 4  # tokens, and those of the beginning
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


@dataclass
class Question:
    """Ids: the facts, in the order in which the window has them among others; what stands before the answer; the answer."""

    facts: list[list[int]]
    asking: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return sum(map(len, [*self.facts, self.asking, self.answer]))


def made_up_word(generator: random.Random) -> str:
    syllables = range(generator.randint(2, 3))
    return "".join(generator.choice(CONSONANTS) + generator.choice(VOWELS) for _ in syllables).capitalize()


def make_names(language: Language, generator: random.Random, count: int = 1) -> list[Value]:
    if isinstance(language, Sentences):
        return [made_up_word(generator) for _ in range(count)]
    return language.names(generator, count)


def make_value(language: Language, generator: random.Random) -> Value:
    if not isinstance(language, Sentences):
        return language.values(generator, 1)[0]
    if generator.random() < 0.5:
        return str(generator.randrange(100, 1_000_000))
    return " ".join(made_up_word(generator) for _ in range(generator.randint(1, 3)))


def ask(language: Language, question: str, beginning: str, **fields: Value) -> list[int]:
    return language.say("\n\n") + language.say(question, **fields) + language.tail + language.say(beginning, **fields)


def ask_for_value(language: Language, generator: random.Random) -> Question:
    (name,), value = make_names(language, generator), make_value(language, generator)
    fact, question, beginning = generator.choice(FORMS)
    return Question(
        [language.say(fact, name=name, value=value)],
        ask(language, question, beginning, name=name),
        language.say(" {value}", value=value),
    )


def ask_for_values(language: Language, generator: random.Random) -> Question:
    """All values of one name, in their order."""
    (name,), count = make_names(language, generator), generator.randint(*REPEATED)
    values = {f"value{index}": make_value(language, generator) for index in range(count)}
    fact, question, beginning = generator.choice(REPEATED_FORMS)
    return Question(
        [language.say(fact, name=name, value=value) for value in values.values()],
        ask(language, question, beginning, name=name),
        language.say(" and".join(f" {{{field}}}" for field in values), **values),
    )


def ask_along_chain(language: Language, generator: random.Random) -> Question:
    """The value of the last of some names, of which each is said to have that of the one before."""
    names = make_names(language, generator, generator.randint(*CHAINED))
    value = make_value(language, generator)
    first, other, question, beginning = generator.choice(CHAINED_FORMS)
    return Question(
        [language.say(first, name=names[0], value=value)]
        + [language.say(other, name=name, other=before) for before, name in zip(names, names[1:])],
        ask(language, question, beginning, name=names[-1]),
        language.say(" {value}", value=value),
    )


def ask_for_passage(language: Language, generator: random.Random) -> Question:
    """How a passage goes on: one of filler, or one of values, in which nothing follows from what is before."""
    passage = sum(language.fill(generator, PASSAGE), []) if generator.random() < 0.5 else []
    while len(passage) < PASSAGE:
        passage += language.say(" {value}", value=make_value(language, generator))
    return Question([passage[:PASSAGE]], ask(language, AGAIN, "") + passage[:GIVEN], passage[GIVEN:PASSAGE])


# How often each is asked. Single values stay two of three questions, half of the tokens, and half of those that are asked for.
KINDS = {ask_for_value: 6, ask_for_values: 1, ask_along_chain: 1, ask_for_passage: 1}


def make_questions(language: Language, length: int, count: int, seed: int = 0) -> Questions:
    """`count` windows of `length` tokens."""
    windows, marks = [], []
    for index in range(count):
        generator = random.Random(f"questions {seed} {index}")
        start = language.head + language.say(INTRODUCTION)
        room = int((1 - FILLER) * length) - len(start)
        questions = [ask_for_value(language, generator)]  # the shortest: it is to fit into any window
        while room >= sum(map(len, questions)):
            (kind,) = generator.choices([*KINDS], KINDS.values())
            questions.append(kind(language, generator))
        questions = questions[:-1] or questions
        end, answers = [], []
        for question in generator.sample(questions, len(questions)):
            end += question.asking
            answers += [False] * (len(end) - len(answers)) + [True] * len(question.answer)
            end += question.answer
        order = [question for question in questions for _ in question.facts]
        generator.shuffle(order)
        told = [question.facts.pop(0) for question in order]
        filler = language.fill(generator, max(0, length - len(start) - sum(map(len, told)) - len(end)))
        ids = list(start)
        places = sorted(generator.randrange(len(filler) + 1) for _ in told)
        for place, piece in enumerate([*filler, []]):
            while places and places[0] == place:
                places.pop(0)
                ids += told.pop(0)
            ids += piece
        marks.append(([False] * len(ids) + answers)[-length:])
        windows.append((ids + end)[-length:])
    ids, asked = torch.tensor(windows, dtype=torch.long), torch.tensor(marks, dtype=torch.bool)
    return Questions(ids.view(-1, length), asked.view(-1, length))

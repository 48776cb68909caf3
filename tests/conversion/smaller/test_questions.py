"""Questions for calibration, read back from their ids."""

import random
import re

import pytest
import torch

from conversion.evaluate.tasks import TASKS, make_samples
from conversion.smaller.languages import Sentences, Tokens
from conversion.smaller.questions import (
    CHAINED_FORMS,
    GIVEN,
    KINDS,
    PASSAGE,
    ask_along_chain,
    ask_for_passage,
    ask_for_value,
    ask_for_values,
    make_questions,
)

from ..evaluate.test_tasks import characters


pytestmark = pytest.mark.once


def runs(ids: torch.Tensor, asked: torch.Tensor) -> list[tuple[int, list[int]]]:
    """Where each answer begins, and its ids."""
    found = []
    for place, (token, mark) in enumerate(zip(ids.tolist(), asked.tolist())):
        if mark and (place == 0 or not asked[place - 1]):
            found.append((place, []))
        if mark:
            found[-1][1].append(token)
    return found


def test_answers_stand_in_the_text_before_them():
    questions = make_questions(Sentences(characters(), "Zounds! " * 400), 3000, 4)
    assert questions.ids.shape == questions.asked.shape == (4, 3000)
    lists = 0
    texts = ["".join(map(chr, ids)) for ids in questions.ids.tolist()]
    assert len(set(texts)) == 4
    for text, ids, asked in zip(texts, questions.ids, questions.asked):
        answers = runs(ids, asked)
        assert len(answers) > 10 and text.count("Zounds!") > 40
        end = text.index("?", text.index("Zounds!"))
        notes = text[: text.rindex("\n\n", 0, end)]  # behind them are the questions
        for place, answer in answers:
            answer = "".join(map(chr, answer))
            assert place > len(notes) and text.endswith(answer) == (place == answers[-1][0])
            values = answer.split(" and") if " and " in answer else [answer]
            places = [notes.find(value) for value in values]
            assert -1 not in places and places == sorted(places)
            lists += len(values) > 1
    assert lists


@pytest.mark.parametrize("language", [Sentences(characters()), Tokens(999)], ids=["sentences", "ids"])
def test_kinds_of_questions(language):
    """Each fact once, and what is asked for is what they say."""
    generator = random.Random(3)
    say = language.say

    def has(ids: list[int], part: list[int]) -> bool:
        return any(ids[i : i + len(part)] == part for i in range(len(ids)))

    for _ in range(20):
        one, several, chain, passage = (
            kind(language, generator) for kind in (ask_for_value, ask_for_values, ask_along_chain, ask_for_passage)
        )
        assert len(one.facts) == 1 and has(one.facts[0], one.answer)
        assert 2 <= len(several.facts) <= 4
        left = several.answer
        for fact in several.facts:  # their values, one after the other, are the answer
            longest = max(n for n in range(1, len(left) + 1) if has(fact, left[:n]))
            left = left[longest:]
            left = left[len(say(" and")) :] if left else left
        assert not left
        assert has(chain.facts[0], chain.answer) and not any(has(fact, chain.answer) for fact in chain.facts[1:])
        assert has(passage.facts[0], passage.asking[-GIVEN:] + passage.answer) and len(passage.facts[0]) == PASSAGE
        assert len(passage.answer) == PASSAGE - GIVEN
    assert {*KINDS} == {ask_for_value, ask_for_values, ask_along_chain, ask_for_passage}


def test_chains_hang_together():
    def read(template: str, text: str) -> dict[str, str] | None:
        fields = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(template))
        found = re.fullmatch(fields, text)
        return found and found.groupdict()

    language, generator, lengths = Sentences(characters()), random.Random(0), set()
    for _ in range(20):
        question = ask_along_chain(language, generator)
        first, *others = ("".join(map(chr, fact)) for fact in question.facts)
        (form,) = (form for form in CHAINED_FORMS if read(form[0], first))
        name = read(form[0], first)["name"]
        for fact in others:
            link = read(form[1], fact)
            assert link["other"] == name
            name = link["name"]
        assert name in "".join(map(chr, question.asking))
        lengths.add(len(question.facts))
    assert lengths == {2, 3, 4}


def test_words_are_not_those_of_the_evaluation():
    """So that a model is not measured with what it has learnt."""
    language = Sentences(characters(), "Zounds! " * 400)

    def phrases(ids: list[int]) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", "".join(map(chr, ids)).replace("Zounds!", ""))
        return {tuple(words[i : i + 4]) for i in range(len(words)) if "".join(words[i : i + 4]).isalpha()}

    questions = phrases(make_questions(language, 20_000, 1).ids[0].tolist())
    for task in TASKS:
        (sample,) = make_samples(language, task, 600, 1)
        assert len(phrases(sample.prompt)) > 10 and not phrases(sample.prompt) & questions


def test_bare_ids_and_short_windows():
    for length in (40, 90):
        questions = make_questions(Tokens(99), length, 3)
        assert questions.ids.shape == (3, length)
        for ids, asked in zip(questions.ids, questions.asked):
            for place, answer in runs(ids, asked):
                before = ids[:place].tolist()
                assert any(before[i : i + 3] == answer[:3] for i in range(place))
    short = make_questions(Sentences(characters()), 30, 2)
    assert short.ids.shape == (2, 30) and short.asked.any(1).all()
    none = make_questions(Tokens(99), 40, 0)
    assert none.ids.shape == (0, 40) and none.ids.dtype == short.ids.dtype and none.asked.dtype == short.asked.dtype


def test_seeds():
    first, again, other = (make_questions(Tokens(99), 50, 2, seed).ids for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)

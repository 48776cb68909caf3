"""Questions for calibration, read back from their ids."""

import pytest
import torch

from conversion.smaller.languages import Sentences, Tokens
from conversion.smaller.questions import make_questions

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
    questions = make_questions(Sentences(characters(), "Zounds! " * 400), 1500, 4)
    assert questions.ids.shape == questions.asked.shape == (4, 1500)
    texts = ["".join(map(chr, ids)) for ids in questions.ids.tolist()]
    assert len(set(texts)) == 4
    for text, ids, asked in zip(texts, questions.ids, questions.asked):
        answers = runs(ids, asked)
        assert len(answers) > 5 and text.count("Zounds!") > 20
        notes = text.index("\n\n", text.index("Zounds!"))  # where the questions begin
        for place, answer in answers:
            answer = "".join(map(chr, answer))
            assert place > notes and f"{answer}" in text[:notes] and text.endswith(answer) == (place == answers[-1][0])


def test_bare_ids_and_short_windows():
    for length in (40, 90):
        questions = make_questions(Tokens(99), length, 3)
        assert questions.ids.shape == (3, length)
        for ids, asked in zip(questions.ids, questions.asked):
            ids = ids.tolist()
            for place, answer in runs(torch.tensor(ids), asked):
                before = ids[place - 1 : place + len(answer)]  # the name, and the value
                assert any(ids[i : i + len(before)] == before for i in range(place - 1))
    short = make_questions(Sentences(characters()), 30, 2)
    assert short.ids.shape == (2, 30) and short.asked.any(1).all()
    none = make_questions(Tokens(99), 40, 0)
    assert none.ids.shape == (0, 40) and none.ids.dtype == short.ids.dtype and none.asked.dtype == short.asked.dtype


def test_seeds():
    first, again, other = (make_questions(Tokens(99), 50, 2, seed).ids for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)

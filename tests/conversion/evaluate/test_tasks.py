"""What the tasks hold, read back from their ids."""

import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import PreTrainedTokenizerFast

from conversion.evaluate.tasks import TASKS, TooShort, make_samples
from conversion.smaller.languages import Sentences, Tokens, find_language


pytestmark = pytest.mark.once


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single characters."""
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(256)}, unk_token="\x00"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("task", TASKS)
def test_facts_stand_where_they_should(task):
    language = find_language(characters(), 256)
    samples = make_samples(language, task, 1999, 5)
    assert [sample.depth for sample in samples] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert max(len(sample.prompt) + len(sample.answer) for sample in samples) == 1999
    assert len({len(sample.prompt) for sample in samples}) == 1
    for sample in samples:
        text, answer = "".join(map(chr, sample.prompt)), "".join(map(chr, sample.answer))
        question = text.index("\n\n", text.index("\n\n") + 1)
        parts = re.findall(r"\d+", answer) or [answer.strip()]
        assert sample.values == (answer.split() if task == "copying" else parts)
        assert (
            language.part_found(sample.values, sample.answer)
            == 1
            > language.part_found(sample.values, sample.answer[:-1])
        )
        assert all(text.count(part) == 1 and text.index(part) < question for part in parts), "guessable, or not there"
        facts = [text[place : text.index(".", place)] for place in sample.places]
        if task == "variables":
            assert parts[0] in facts[0] and text[question:].count(facts[-1].split(" holds")[0].strip()[4:]) == 2
        else:
            assert all(part in fact for part, fact in zip(parts, facts)) and len(parts) == len(facts)
        # Of one fact, the place is that of the depth, to a piece of the filler.
        if task in ("needle", "keys", "copying"):
            assert abs(sample.places[0] / question - sample.depth) < 0.12
    assert len({tuple(sample.answer) for sample in samples}) == 5


def test_seeds_and_texts():
    text = "Zounds! " * 400
    language = Sentences(characters(), text)
    first, again, other = (make_samples(language, "keys", 700, 2, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert "".join(map(chr, first[0].prompt)).count("Zounds!") > 20
    with pytest.raises(TooShort, match="--lengths 100: task keys needs at least"):
        make_samples(language, "keys", 100, 1)


@pytest.mark.parametrize("task", TASKS)
def test_bare_ids(task):
    for sample in make_samples(Tokens(99), task, 64, 3):
        assert len(sample.prompt) + len(sample.answer) == 64
        assert all(0 < token < 99 for token in sample.prompt + sample.answer)
        assert sum(sample.values, ()) == tuple(sample.answer)
        assert Tokens(99).part_found(sample.values, sample.answer[:-1]) == 1 - 1 / len(sample.values)
        if task == "copying":
            start = sample.places[0]
            assert sample.prompt[start : start + 12] == sample.prompt[-4:] + sample.answer
        elif task in ("needle", "keys"):
            start = sample.places[0]
            assert sample.prompt[start : start + 4] == sample.prompt[-1:] + sample.answer

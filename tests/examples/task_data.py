"""Small data for the nine tasks, in the columns of the Hub's data sets."""

import json
import random
from pathlib import Path


WORDS = "the king queen of wood walks speaks to a crown and sword with thy love my lord good night".split()


def _sentence(generator: random.Random, low: int = 2, high: int = 8) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))


def _arc(generator: random.Random) -> dict:
    choices = {"text": [_sentence(generator) for _ in range(4)], "label": ["A", "B", "C", "D"]}
    return {"question": _sentence(generator), "choices": choices, "answerKey": generator.choice("ABCD")}


def _boolq(generator: random.Random) -> dict:
    return {
        "passage": _sentence(generator, 8, 16),
        "question": _sentence(generator),
        "label": generator.randrange(2),
        "idx": 0,
    }


def _hellaswag(generator: random.Random) -> dict:
    return {
        "activity_label": _sentence(generator, 1, 2),
        "ctx_a": _sentence(generator),
        "ctx_b": _sentence(generator, 1, 3),
        "endings": [f"{_sentence(generator)} [step]" for _ in range(4)],
        "label": str(generator.randrange(4)),
    }


def _openbookqa(generator: random.Random) -> dict:
    return {("question_stem" if name == "question" else name): value for name, value in _arc(generator).items()}


def _piqa(generator: random.Random) -> dict:
    return {
        "goal": _sentence(generator),
        "sol1": _sentence(generator),
        "sol2": _sentence(generator),
        "label": generator.randrange(2),
    }


def _winogrande(generator: random.Random) -> dict:
    return {
        "sentence": f"{_sentence(generator)} _ {_sentence(generator)}",
        "option1": "king",
        "option2": "queen",
        "answer": generator.choice("12"),
    }


def _mmlu(generator: random.Random) -> dict:
    return {
        "question": _sentence(generator),
        "choices": [_sentence(generator, 1, 3) for _ in range(4)],
        "answer": generator.randrange(4),
        "subject": "any",
    }


def _sciq(generator: random.Random) -> dict:
    options = {name: _sentence(generator, 1, 3) for name in ("distractor1", "distractor2", "distractor3")}
    return {
        "question": _sentence(generator),
        "support": _sentence(generator, 8, 16),
        "correct_answer": _sentence(generator, 1, 3),
        **options,
    }


TASKS = {
    "arc_easy": (_arc, ("train", "validation", "test")),
    "arc_challenge": (_arc, ("train", "validation", "test")),
    "boolq": (_boolq, ("train", "validation")),
    "hellaswag": (_hellaswag, ("train", "validation")),
    "openbookqa": (_openbookqa, ("train", "validation", "test")),
    "piqa": (_piqa, ("train", "validation")),
    "winogrande": (_winogrande, ("train", "validation")),
    "mmlu_anatomy": (_mmlu, ("dev", "test")),
    "mmlu_virology": (_mmlu, ("dev", "test")),
    "sciq": (_sciq, ("train", "validation", "test")),
}


def write_task_data(directory: Path, questions: int, seed: int) -> None:
    """TASK/SPLIT.jsonl of random questions; mmlu_virology has twice as many as the others."""
    generator = random.Random(seed)
    for task, (make, splits) in TASKS.items():
        (directory / task).mkdir(parents=True)
        for split in splits:
            number = questions * 2 if task == "mmlu_virology" else questions
            rows = [json.dumps(make(generator)) for _ in range(number)]
            (directory / task / f"{split}.jsonl").write_text("\n".join(rows) + "\n")

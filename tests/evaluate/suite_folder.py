"""A folder of texts and questions in the layout of the published suites, made here."""

import json

from helpers import text

LETTERS = ["A", "B", "C", "D"]


def rows(i):
    """The i-th question of each task."""
    choices = {"text": [str(2 * i), "a cat", "a river", str(i + 7)], "label": LETTERS}
    options = f"a ) {i + 1} , b ) {i} , c ) {2 * i} , d ) 7 , e ) none of these"
    return {
        "openbookqa/test": {"id": str(i), "question_stem": f"Twice {i} is", "choices": choices, "answerKey": "A"},
        "arc_easy/test": {"id": str(i), "question": f"What is {i} + {i}?", "choices": choices, "answerKey": "A"},
        "arc_challenge/test": {"id": str(i), "question": f"Is {i} a cat?", "choices": choices, "answerKey": "B"},
        "winogrande/validation": {
            "sentence": f"The cat ate {i} fish because _ was hungry.", "option1": "the cat", "option2": "the fish",
            "answer": "1",
        },
        "hellaswag/validation": {
            "ind": i, "activity_label": "Cooking", "ctx_a": f"A man takes {i} eggs.", "ctx_b": "the man",
            "ctx": f"A man takes {i} eggs. the man", "endings": ["cooks.", "flies.", "sings loudly.", "is blue."],
            "split": "val", "label": str(i % 4),
        },
        "piqa/validation": {"goal": f"Count to {i}", "sol1": "count slowly", "sol2": "eat a spoon", "label": i % 2},
        "mathqa/test": {
            "Problem": f"what is {i} + 1 ?", "Rationale": "", "options": options, "correct": "a",
            "annotated_formula": "", "linear_formula": "", "category": "general",
        },
        "boolq/validation": {
            "question": f"is {i} a number", "passage": f"{i} is a number.", "idx": i, "label": i % 2,
        },
        "gsm8k/test": {"question": f"What is {i} + 1?", "answer": f"It is {i + 1}\n#### {i + 1}"},
        "gsm8k/train": {"question": f"What is {i} + 2?", "answer": f"It is {i + 2}\n#### {i + 2}"},
        "truthfulqa/validation": {
            "question": f"Is {i} a cat?", "mc1_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]},
            "mc2_targets": {"choices": ["No.", "It is not.", "Yes."], "labels": [1, 1, 0]},
        },
    }  # fmt: skip


def write_data(folder, questions=9):
    for i in range(questions):
        for name, row in rows(i).items():
            path = folder / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
    for name in ("wikitext2", "ptb", "c4"):
        (folder / name).mkdir()
    (folder / "wikitext2" / "wiki.test.raw.txt").write_text(f" \n = A title = \n \n {text(900)} \n {text(500, 1)} \n")
    (folder / "ptb" / "ptb.test.txt").write_text("".join(f" {text(50, i)} \n" for i in range(20)))
    (folder / "c4" / "validation.jsonl").write_text(
        "".join(json.dumps({"text": text(60, i)}) + "\n" for i in range(20))
    )
    return folder

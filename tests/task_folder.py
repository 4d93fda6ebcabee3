"""A folder of tasks for lm-evaluation-harness whose questions are made here."""

ROWS = """
import datasets


def sums(**_):
    pairs = [(a, b) for a in range(6) for b in (1, 2)]
    rows = [{"a": a, "b": b, "choices": [str(a + b), str(a + b + 1), str(a)], "right": 0} for a, b in pairs]
    return {"train": datasets.Dataset.from_list(rows[:4]), "test": datasets.Dataset.from_list(rows[4:])}


def words(**_):
    rows = [{"word": word} for word in ("cat", "rank", "river", "token")]
    return {"test": datasets.Dataset.from_list(rows)}


def science(**_):
    letters = ["A", "B", "C"]
    rows = [
        {
            "id": str(i),
            "question": f"What is {i} times two?",
            "choices": {"text": [str(2 * i), "a cat", str(i + 7)], "label": letters},
            "answerKey": "A",
        }
        for i in range(9)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def broken(**_):
    raise OSError("no rows are here\\nbut a second line")
"""

FILES = {
    "sums.yaml": '''
task: sums
custom_dataset: !function rows.sums
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
doc_to_text: "{{a}} + {{b}} ="
doc_to_target: right
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.0}
''',
    "words.yaml": '''
task: words
custom_dataset: !function rows.words
output_type: generate_until
test_split: test
num_fewshot: 0
doc_to_text: "Say {{word}}:"
doc_to_target: "{{word}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
''',
    "prose.yaml": '''
task: prose
custom_dataset: !function rows.words
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "A {{word}} is more than a word."
metric_list: [{metric: word_perplexity}]
''',
    "local_arc_easy.yaml": '''
group: local_arc_easy
task:
  - task: arc_easy
    custom_dataset: !function rows.science
    training_split: null
    validation_split: null
''',
    "both.yaml": '''
group: both
task: [sums, words]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
''',
    "arc_challenge.yaml": '''
include: sums.yaml
task: arc_challenge
''',
    "broken_rows.yaml": '''
include: sums.yaml
task: broken_rows
custom_dataset: !function rows.broken
''',
    "broken_prompt.yaml": '''
include: sums.yaml
task: broken_prompt
doc_to_text: "{{a.no.such}}"
''',
}  # fmt: skip


def write_tasks(folder, **changes):
    """The folder, with files changed (NAME=TEXT stands for NAME.yaml) or left out (NAME=None)."""
    folder.mkdir()
    (folder / "rows.py").write_text(ROWS)
    for name, text in {**FILES, **{f"{name}.yaml": text for name, text in changes.items()}}.items():
        if text is not None:
            (folder / name).write_text(text)
    return folder

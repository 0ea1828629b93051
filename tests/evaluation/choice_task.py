"""A task of lm-evaluation-harness: which of the choices continues a context."""

# Text of its file, with the folder of `choices.jsonl`, whose lines have `context`, `choices` and the number `label`.
CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""

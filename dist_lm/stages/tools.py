"""Stage `tools`: next-token prediction on what the assistant writes in conversations, with a share of text.

Before the first step and after the last it is asked, about conversations of val, what it would call; all its tools are
new to it.
"""

import json
from collections.abc import Sequence

from dist_lm.data.mapped import MappedCorpus
from dist_lm.evaluation.tool_questions import Asked, choose, shown
from dist_lm.evaluation.tool_score import Verdict, figures, judge, read_answer
from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.stages.sampling import answer_all
from dist_lm.stages.training_stage import Closing, TrainingStage
from dist_lm.storage import durable
from dist_lm.tokenizer.symbols import END
from dist_lm.training.objective import next_token

ROOM = 32  # tokens of an answer beyond twice those of the right one


def examine(closing: Closing) -> dict[str, float]:
    """`tools/*`: answers to questions about val, greedy, against what the conversations say."""
    settings = closing.config.stage.questions
    if not settings.per_kind:
        return {}
    corpus = MappedCorpus.open(closing.run.work.corpus(closing.config.stage.corpus), "val")
    questions = choose(corpus, closing.tokenizer, settings.per_kind, closing.config.model.max_seq_len)
    requests = requests_of(questions, closing.tokenizer.special_ids[END], settings.max_new_tokens)
    answers = answer_all(closing, requests, "stage.questions")
    verdicts = [verdict_of(one, answer, closing) for one, answer in zip(questions, answers, strict=True)]
    if closing.world.is_first and questions:
        keep(closing, questions, answers, verdicts)
    return figures((one.question.kind, verdict) for one, verdict in zip(questions, verdicts, strict=True))


def requests_of(questions: Sequence[Asked], end_id: int, max_new_tokens: int) -> list[Request]:
    """Greedy, up to the end of the turn. A turn more than twice as long as the right one, and then some, is cut off."""
    return [
        Request(
            str(number),
            one.prompt,
            SamplingParams(
                max_new_tokens=min(max_new_tokens, 2 * len(one.expected) + ROOM), temperature=0, stop_tokens=(end_id,)
            ),
        )
        for number, one in enumerate(questions)
    ]


def verdict_of(one: Asked, answer: Answer, closing: Closing) -> Verdict:
    """What an answer is worth."""
    tools = one.question.asked.tools
    found = read_answer(answer.tokens, answer.finish == "stop", closing.tokenizer)
    return judge(found, one.question.expected, tools)


def keep(closing: Closing, questions: Sequence[Asked], answers: Sequence[Answer], verdicts: Sequence[Verdict]) -> None:
    """Write `samples/step_N.jsonl`: one object a question."""
    lines = [
        json.dumps(
            {
                "kind": one.question.kind,
                "prompt": shown(one.prompt, closing.tokenizer),
                "expected": shown(one.expected, closing.tokenizer),
                "found": shown(answer.tokens, closing.tokenizer),
                "finish": answer.finish,
                "right": verdict.exact,
                "parses": verdict.parses,
                "valid_call": verdict.valid,
                "names": verdict.names,
                "right_calls": verdict.right,
            },
            ensure_ascii=False,
        )
        for one, answer, verdict in zip(questions, answers, verdicts, strict=True)
    ]
    durable.write_text(closing.run.samples / f"step_{closing.step:08d}.jsonl", "".join(line + "\n" for line in lines))


STAGE = TrainingStage(
    "tools", lambda config: next_token(config.stage.label_smoothing, config.stage.z_loss), close=examine, open=examine
)

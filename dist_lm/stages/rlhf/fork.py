"""Forks a recorded conversation of a run of stage `rlhf` at a turn. Nothing is written into the run."""

from dataclasses import dataclass

from dist_lm.chat.template import stop_tokens
from dist_lm.errors import ArtefactError, require
from dist_lm.rlhf.conversation_loop import ConversationLoop
from dist_lm.rlhf.environment_rollouts import hold_together
from dist_lm.rlhf.episodes import Episode
from dist_lm.rlhf.fork import Forked, check_fork, forked
from dist_lm.rlhf.request_feed import Ask
from dist_lm.stages.rlhf.record import ConversationRecord
from dist_lm.stages.rlhf.replay import Chosen, Drawing, fresh_environment, no_weights, own_threads
from dist_lm.tokenizer.tokenizer import Tokenizer, text_with_marks, tokens_with_marks


@dataclass(frozen=True)
class Fork:
    """A fork of a recorded conversation, and how it ended."""

    iteration: int
    rollout: int
    turn: int  # of the model, from 1: the first one that is not the recorded one
    is_edited: bool
    weights: str  # the checkpoint that drew its turns
    threads: int | None  # of the engine, where bits are compared
    recorded: Episode
    now: Episode
    forked: Forked
    texts: tuple[str, ...]  # of the model's turns, with marks: as an edit is written


def fork(record: ConversationRecord, chosen: Chosen, turn: int, edit: str | None, edit_option: str = "--edit") -> Fork:
    """Returns a recorded conversation that goes on differently from a turn on.

    Args:
        turn: of the model, from 1.
        edit: text of that turn, with marks by their names; None: the model draws it.
        edit_option: option that gave the edit, for messages.

    Raises:
        ConfigError: there is no such conversation or turn, or the edit does not fit.
        ArtefactError: the environment does not answer as recorded, weights are not kept, or a file is damaged or of
            something else.
        UserError: the environment, or the constraint of turns, cannot be opened.
        RequestError: the engine refuses a request.
        Exception: what a conversation raises first; the others are cancelled.
        PoolFailure: of the source, see `RolloutSource`.
    """
    is_chosen = chosen.iteration is not None and chosen.rollout is not None
    require(is_chosen, "--fork", turn, "--iteration and --rollout beside it")
    is_lock_step = not record.config.rlhf.asynchronous
    require(is_lock_step, "--fork", turn, "a run without rlhf.asynchronous, whose turns are all drawn by one version")
    (iteration,) = record.iterations(chosen.iteration)
    ((rollout, recorded),) = chosen.rollouts_of(iteration)
    check_fork(recorded, turn)
    checkpoint = record.weights_of(iteration.version)
    if checkpoint is None:
        raise ArtefactError(f"iteration {iteration.number}: {no_weights(record, iteration.version)}")

    with own_threads(), ConversationLoop(fresh_environment(record)) as conversations:
        drawing = Drawing(record, conversations)
        edited_ids = None if edit is None else edited_turn(edit, drawing.how.tokenizer, edit_option)
        # Drawing the record again finds the number of threads that gives its bits.
        if drawing.is_exact:
            drawing.outcomes({iteration.version: checkpoint}, [recorded])
        source = drawing.source(checkpoint, iteration.version)
        (task,) = record.tasks(recorded.position, 1)
        ended: list[Forked] = []

        async def hold(ask: Ask) -> None:
            host = conversations.host
            ended.append(
                await forked(
                    drawing.how, host, recorded, task, ask, turn, edited_ids, drawing.is_exact, edit_option=edit_option
                )
            )

        hold_together(source, conversations, [hold], at_once=1)
        threads = drawing.threads

    (result,) = ended
    if result.episode is None:
        raise ArtefactError(
            f"rollout {rollout} of iteration {iteration.number} cannot be forked at turn {turn}, as it does not happen "
            f"again: {result.refused}: fork it at an earlier turn, or make the environment deterministic"
        )
    texts = tuple(text_with_marks(spoken.tokens, drawing.how.tokenizer) for spoken in result.spoken)
    return Fork(
        iteration=iteration.number,
        rollout=rollout,
        turn=turn,
        is_edited=edit is not None,
        weights=str(checkpoint),
        threads=threads,
        recorded=recorded,
        now=result.episode,
        forked=result,
        texts=texts,
    )


def edited_turn(text: str, tokenizer: Tokenizer, option: str = "--edit") -> list[int]:
    """Returns the token ids of a turn that a person wrote, with the one that ends it.

    Args:
        text: with marks by their names, such as `<tool_call>`.
        option: option that gave the text, for messages.

    Raises:
        ConfigError: it is empty, or the mark that ends a turn stands within it.
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    ends = (tokenizer.eot_id, *stop_tokens(tokenizer))
    ids = tokens_with_marks(text, tokenizer)
    if ids and ids[-1] in ends:
        ids.pop()
    require(bool(ids), option, repr(text), "the text of a turn")
    within = [token for token in ids if token in ends]
    require(not within, option, text_with_marks(within[:1], tokenizer), "a turn's end only at the end")
    return [*ids, ends[1]]

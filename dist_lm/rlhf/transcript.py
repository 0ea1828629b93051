"""A conversation of several turns as token ids: ids are appended and never change.

The model's turn is appended as it was drawn, then the ids of the template's text up to its next turn: the mark that
ends the turn if the model was cut off, the turns of tools and user, and the opening of the next answer. No text of the
model is turned into ids again.

    sample   prompt | turn | between | turn | between | turn
    drawn    0 0 0    1 1    0 0 0     1 1    0 0       1 1

The template of an imported model may write earlier turns otherwise when others follow, such as without their thinking.
Ids drawn so far are then no beginning of the next prompt, so a new sample begins there. The same holds where the
environment itself puts other turns in the place of those so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dist_lm.chat.messages import Call, ChatError, Conversation, Message, check_conversation
from dist_lm.chat.parse import parse_turn, with_thinking
from dist_lm.chat.template import following, prompt, stop_tokens
from dist_lm.tokenizer.tokenizer import Tokenizer, text_with_marks

EMPTY_TURN = "(empty)"  # text of a turn without any, where a template must write one


@dataclass(frozen=True)
class ReadTurn:
    """A turn of the model as a message."""

    message: Message  # a template writes it if it renders the turn again
    text: str  # beside thinking and calls; of an unreadable turn all that was drawn, marks included
    calls: tuple[Call, ...] = ()
    is_readable: bool = True


def read_turn(token_ids: Sequence[int], tokenizer: Tokenizer) -> ReadTurn:
    """Returns the text and calls of a turn, without its thinking. A turn that cannot be read keeps its text with marks,
    and has no calls.

    Args:
        token_ids: as drawn, perhaps with the token that ended the turn.

    Raises:
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    ends = {tokenizer.eot_id, *stop_tokens(tokenizer)}
    written = list(token_ids)
    if written and written[-1] in ends:
        written.pop()
    try:
        message = with_thinking(parse_turn(written, tokenizer))
        # A turn alone is no conversation, so a request stands before it.
        check_conversation(Conversation((Message("user", "."), message)))
    except ChatError:
        text = text_with_marks(written, tokenizer)
        return ReadTurn(Message("assistant", text or EMPTY_TURN), text, is_readable=False)
    return ReadTurn(message, message.content, message.calls)


@dataclass
class Sample:
    """Token ids that a model reads as one sequence."""

    ids: list[int]
    drawn: list[bool] = field(default_factory=list)  # True where the model drew the id; the others give no loss

    def append(self, ids: Sequence[int], drawn: bool) -> None:
        self.ids += ids
        self.drawn += [drawn] * len(ids)


class Transcript:
    """A growing conversation: its turns, and its samples of token ids."""

    def __init__(self, opening: Conversation, tokenizer: Tokenizer) -> None:
        """
        Args:
            opening: the turns before the model's first one, with the tools of all turns.

        Raises:
            ChatError: `opening` is not well formed, or its last turn asks nothing.
        """
        self._tokenizer = tokenizer
        self._ends = (tokenizer.eot_id, *stop_tokens(tokenizer))
        self.conversation = opening
        first_prompt = prompt(opening, tokenizer)
        self.samples = [Sample(first_prompt, [False] * len(first_prompt))]

    @property
    def prompt(self) -> list[int]:
        """The ids that the model continues next."""
        return self.samples[-1].ids

    @property
    def n_tokens(self) -> int:
        """The number of token ids of all samples."""
        return sum(len(sample.ids) for sample in self.samples)

    @property
    def finished_samples(self) -> list[Sample]:
        """The samples up to the last id that the model drew: what follows was asked and never answered."""
        samples = []
        for sample in self.samples:
            length = max((index for index, is_drawn in enumerate(sample.drawn, 1) if is_drawn), default=0)
            if length:
                samples.append(Sample(sample.ids[:length], sample.drawn[:length]))
        return samples

    def add_turn(self, token_ids: Sequence[int]) -> ReadTurn:
        """Appends a turn of the model.

        Args:
            token_ids: as drawn, with the token that ended the turn if one did; not empty.

        Raises:
            UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
        """
        turn = read_turn(token_ids, self._tokenizer)
        self.samples[-1].append(token_ids, drawn=True)
        self.conversation = self._with((turn.message,))
        return turn

    def add_observation(self, messages: Sequence[Message]) -> None:
        """Appends the turns that follow one of the model, and the opening of its next turn, to the last sample.

        If the template now writes the earlier turns otherwise, a new sample with the whole prompt begins instead.

        Raises:
            ChatError: the turns do not fit the model's one, JSON cannot express a result, or the template refuses them;
                the transcript stays as it is.
        """
        answered, conversation = self.conversation, self._with(messages)
        check_conversation(conversation)
        if not messages or messages[-1].role not in ("user", "tool"):
            raise ChatError("expected a last turn of user or tool, which the assistant answers")

        between = following(answered, conversation, self._tokenizer)
        if between is None:
            self.begin_sample(conversation)
            return
        # A turn that a limit or end-of-text ended lacks the mark that the template writes there.
        turn_end = self._ends[1]
        missing_end = [] if self.prompt[-1] in self._ends[1:] else [turn_end]
        self.samples[-1].append([*missing_end, *between], drawn=False)
        self.conversation = conversation

    def begin_sample(self, opening: Conversation) -> None:
        """Begins a new sample whose prompt is another conversation, in the place of all turns so far.

        Args:
            opening: as of the first sample.

        Raises:
            ChatError: `opening` is not well formed, or its last turn asks nothing; the transcript stays as it is.
        """
        new_prompt = prompt(opening, self._tokenizer)
        self.samples.append(Sample(new_prompt, [False] * len(new_prompt)))
        self.conversation = opening

    def _with(self, messages: Sequence[Message]) -> Conversation:
        return replace(self.conversation, messages=(*self.conversation.messages, *messages))

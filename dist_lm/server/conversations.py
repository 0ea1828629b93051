"""Remembers the ids of answered turns, so that a conversation goes on with the tokens that the model has written.

The text of an answer may be cut into other tokens when it is encoded again: the model would then go on from tokens that
it never wrote, and a program that trains on the conversation would count them as drawn.
"""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import replace

from dist_lm.chat.documents import write_conversation
from dist_lm.chat.messages import Conversation, Message
from dist_lm.chat.template import following, prompt
from dist_lm.tokenizer.symbols import END
from dist_lm.tokenizer.tokenizer import Tokenizer

MOST_TOKENS = 4 << 20  # remembered, of all conversations together


class Conversations:
    """The ids of the newest answered turns of all clients, by client and what was said up to there. For any thread."""

    def __init__(self, tokenizer: Tokenizer, most_tokens: int = MOST_TOKENS) -> None:
        """
        Args:
            most_tokens: all that is remembered; the oldest conversations are forgotten first.
        """
        self._tokenizer = tokenizer
        self._most_tokens = most_tokens
        self._n_tokens = 0
        self._ids: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()  # up to the mark that ends an answer
        self._lock = threading.Lock()

    def prompt(self, conversation: Conversation, client: str = "") -> tuple[list[int], int]:
        """Returns (the ids that the model continues, how many of them were remembered for this client).

        None are where the conversation has no answer, where one was edited or forgotten, and in the layout of an
        imported model, which may write earlier turns in another way.

        Raises:
            ChatError: as `dist_lm.chat.template.prompt`.
        """
        ids = prompt(conversation, self._tokenizer)  # also checks the conversation
        n_turns = max(
            (n for n, message in enumerate(conversation.messages, 1) if message.role == "assistant"), default=0
        )
        if self._tokenizer.kept_template or not n_turns:
            return ids, 0

        answered = replace(conversation, messages=conversation.messages[:n_turns])
        key = _key(answered, client)
        with self._lock:
            remembered = self._ids.get(key)
            if remembered is None:
                return ids, 0
            self._ids.move_to_end(key)
        rest = following(answered, conversation, self._tokenizer)
        assert rest is not None, "our own layout writes no turn again"
        return [*remembered, *rest], len(remembered)

    def remember(self, conversation: Conversation, answer: Message, ids: list[int], client: str = "") -> None:
        """Remembers an answer; nothing in the layout of an imported model, which may write earlier turns otherwise.

        Args:
            conversation: what was answered.
            answer: as the client gets it.
            ids: of the prompt and the answer; the mark that ends the turn may be missing.
            client: the key that the client has sent; others are not told what is remembered for it.

        Raises:
            UserError: the tokenizer lacks the mark.
        """
        if self._tokenizer.kept_template:
            return
        end = self._tokenizer.mark_id(END)
        # An answer may end by its limit or by end-of-text; the next turn always follows the mark of the end.
        if ids[-1] == self._tokenizer.eot_id:
            ids = ids[:-1]
        if ids[-1] != end:
            ids = [*ids, end]

        key = _key(replace(conversation, messages=(*conversation.messages, answer)), client)
        with self._lock:
            self._n_tokens += len(ids) - len(self._ids.pop(key, ()))
            self._ids[key] = tuple(ids)
            while self._n_tokens > self._most_tokens:
                _, oldest = self._ids.popitem(last=False)
                self._n_tokens -= len(oldest)


def _key(conversation: Conversation, client: str) -> bytes:
    # The client's digest has a fixed length, so no other pair of client and conversation gives the same bytes.
    digest = hashlib.sha256(hashlib.sha256(client.encode()).digest())
    digest.update(write_conversation(conversation).encode())
    return digest.digest()

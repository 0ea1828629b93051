"""What a forgery is: an answer that tries to pass tests without solving their task."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Forgery:
    """An answer for some kinds of task; its language is theirs."""

    name: str
    idea: str  # in a few words
    source: str  # `<name>`: the function that the tests call; `<stub>`: a wrong answer
    kinds: tuple[str, ...]  # of `tests.forgery.kinds.KINDS`
    waits: bool = False  # it runs until it is ended by the clock

    def answer(self, function: str, stub: str) -> str:
        """Returns the answer to a task that asks for `function`."""
        return self.source.replace("<stub>", stub).replace("<name>", function)

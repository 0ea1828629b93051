"""What generated conversations are made of, counted."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from dist_lm.chat.template import render
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tools.data.examples import Example
from dist_lm.tools.data.specification import Parameter

VALUES = re.compile(r"\"[^\"]*\"|'[^']*'|[^\s,;:()]*[\d@/_A-Z][^\s,;:()]*")


@dataclass
class Distribution:
    """Counts over conversations."""

    examples: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    domains: Counter[str] = field(default_factory=Counter)  # of the tools in them
    families: Counter[str] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)  # of the tools that are called
    tools_each: Counter[int] = field(default_factory=Counter)
    calls_each: Counter[int] = field(default_factory=Counter)
    arguments_each: Counter[int] = field(default_factory=Counter)  # of a call
    argument_kinds: Counter[str] = field(default_factory=Counter)  # of arguments that are given
    names: Counter[str] = field(default_factory=Counter)  # of tools
    phrasings: set[str] = field(default_factory=set)  # first requests without their values
    lengths: list[int] = field(default_factory=list)  # tokens, where a tokenizer was given
    learned: int = 0  # tokens that the assistant writes

    def lines(self) -> list[str]:
        """The counts for people."""
        shares = ", ".join(f"{kind} {count / self.examples:.1%}" for kind, count in self.kinds.most_common())
        lines = [
            f"{self.examples:,} conversations: {shares}",
            f"{len(self.names):,} names of tools of {len(self.domains)} domains; {len(self.phrasings):,} phrasings",
            f"tools each: {_spread(self.tools_each)}; calls each: {_spread(self.calls_each)}",
            f"arguments a call: {_spread(self.arguments_each)}; kinds: {_spread(self.argument_kinds)}",
            f"called: {_spread(self.actions)}",
        ]
        if self.lengths:
            ordered = sorted(self.lengths)
            marks = [ordered[int(share * (len(ordered) - 1))] for share in (0, 0.05, 0.5, 0.95, 1)]
            total = sum(ordered)
            lines.append(
                f"tokens: {total:,}, {total / len(ordered):.0f} each (0/5/50/95/100 %: "
                f"{'/'.join(map(str, marks))}); {self.learned / total:.1%} are the assistant's"
            )
        return lines


def distribution(examples: Iterable[Example], tokenizer: Tokenizer | None = None) -> Distribution:
    """The counts over `examples`; lengths too if there is a tokenizer."""
    found = Distribution()
    for example in examples:
        found.examples += 1
        found.kinds[example.kind] += 1
        found.tools_each[len(example.tools)] += 1
        by_name = {tool.tool.name: tool for tool in example.tools}
        for tool in example.tools:
            found.names[tool.tool.name] += 1
            found.domains[tool.domain] += 1
            found.families[tool.family] += 1
        messages = example.conversation.messages
        calls = [call for message in messages for call in message.calls]
        found.calls_each[len(calls)] += 1
        for call in calls:
            tool = by_name[call.name]
            given = [p for p in tool.parameters if _is_given(p, call.arguments)]
            found.actions[tool.action if tool.family == "record" else tool.family] += 1
            found.arguments_each[len(given)] += 1
            found.argument_kinds.update(parameter.kind.split()[0] for parameter in given)
        request = next(message.content for message in messages if message.role == "user")
        found.phrasings.add(VALUES.sub("*", request))
        if tokenizer is not None:
            rendered = render(example.conversation, tokenizer)
            found.lengths.append(len(rendered.tokens))
            found.learned += int(rendered.loss_mask.sum())
    return found


def _is_given(parameter: Parameter, arguments: dict) -> bool:
    place = arguments.get(parameter.inside, {}) if parameter.inside else arguments
    return parameter.key in place


def _spread(counts: Counter) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.0%}" for name, count in counts.most_common(12))

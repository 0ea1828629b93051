"""Names of tools and arguments in the styles that programs use."""

STYLES = ("snake", "camel", "dotted", "reversed", "kebab", "plain")
STYLE_WEIGHTS = (36, 24, 18, 10, 6, 6)


def tool_name(verb: str, thing: str, style: str) -> str:
    """`("get", "purchase order", "camel")` is `getPurchaseOrder`."""
    words = f"{verb} {thing}".split()
    if style == "camel":
        return camel(words)
    if style == "dotted":
        return f"{thing.replace(' ', '_')}.{verb.replace(' ', '_')}"
    if style == "reversed":
        return "_".join(f"{thing} {verb}".split())
    if style == "kebab":
        return "-".join(words)
    if style == "plain":
        return "".join(word.capitalize() for word in words)
    return "_".join(words)


def argument_name(words: str, style: str) -> str:
    """`due date` is `due_date`, or `dueDate` beside a tool in camel case."""
    return camel(words.split()) if style in ("camel", "plain") else "_".join(words.split())


def camel(words: list[str]) -> str:
    """`dueDate`."""
    return words[0] + "".join(word.capitalize() for word in words[1:])


def plural(thing: str) -> str:
    """`policy` is `policies`."""
    if thing.endswith("y") and thing[-2] not in "aeou":
        return f"{thing[:-1]}ies"
    return f"{thing}es" if thing.endswith(("s", "x", "ch", "sh")) else f"{thing}s"


def article(words: str) -> str:
    """`an order`."""
    one = "an" if words[0] in "aeiou" and not words.startswith(("use", "uni")) else "a"
    return f"{one} {words}"

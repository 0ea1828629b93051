"""The actions of record tools: the verbs in their names and in requests, and their arguments.

Actions of one circle lie on one shelf, so a conversation may have several tools for one subject: a tool that finds or
creates a record, and others that take its id. No verb belongs to two actions, so the name of a tool identifies its
action.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Action:
    """One operation on records."""

    key: str
    circle: int  # actions with the same number may occur in one conversation about one subject
    verbs: tuple[str, ...]  # verbs in names of tools
    request_verbs: tuple[str, ...]
    descriptions: tuple[str, ...]  # with {a}: `an order`, {the}: `order`, {all}: `orders`
    takes_id: bool = False  # whether the action needs the id of a record
    own_arguments: tuple[str, ...] = ()  # arguments of the action as `name kind`; `?` marks an optional one
    fields: tuple[int, int] = (0, 0)  # least and largest number of the domain's fields that become arguments
    extra: tuple[str, ...] = ()  # optional arguments; a tool has at most one


ACTIONS = (
    Action(
        "create",
        0,
        ("create", "add", "register", "new"),
        ("create", "add", "register", "make", "set up", "enter"),
        ("Create {a}", "Add {a}", "Register a new {the}", "Make {a} and return its id"),
        fields=(1, 4),
        extra=("priority one_of low/normal/high", "notify flag", "note text"),
    ),
    Action(
        "lookup",
        0,
        ("get", "fetch", "show", "read"),
        ("show me", "get", "look up", "fetch", "pull up", "open"),
        ("Get {a} by its id", "Show the details of {a}", "Read one {the}"),
        takes_id=True,
        extra=("verbose flag", "format one_of short/full/raw"),
    ),
    Action(
        "assign",
        0,
        ("assign", "delegate", "hand over"),
        ("assign", "delegate", "hand over", "pass on"),
        ("Assign {a} to a person", "Hand over {a}"),
        takes_id=True,
        own_arguments=("assignee person",),
        extra=("notify flag", "role one_of lead/helper/observer"),
    ),
    Action(
        "rename",
        0,
        ("rename", "retitle"),
        ("rename", "retitle", "change the name of"),
        ("Rename {a}", "Give {a} a new name"),
        takes_id=True,
        own_arguments=("new name title",),
    ),
    Action(
        "approve",
        0,
        ("approve", "confirm", "accept"),
        ("approve", "confirm", "accept", "sign off on"),
        ("Approve {a}", "Confirm {a}"),
        takes_id=True,
        extra=("comment text", "approver person"),
    ),
    Action(
        "search",
        1,
        ("search", "find", "list", "query"),
        ("find", "search for", "list", "look for", "give me"),
        ("Find {all} that match", "Search {all}", "List the ids of {all}"),
        fields=(1, 2),
        extra=("limit few", "sort by one_of date/name/size", "newest first flag"),
    ),
    Action(
        "update",
        1,
        ("update", "edit", "modify", "set"),
        ("update", "change", "edit", "modify", "correct"),
        ("Change fields of {a}", "Update {a}", "Edit {a}"),
        takes_id=True,
        fields=(1, 2),
    ),
    Action(
        "delete",
        1,
        ("delete", "remove", "cancel", "drop"),
        ("delete", "remove", "cancel", "get rid of"),
        ("Delete {a}", "Remove {a} for good", "Cancel {a}"),
        takes_id=True,
        extra=("reason title", "force flag"),
    ),
    Action(
        "comment",
        1,
        ("comment on", "annotate", "note on"),
        ("comment on", "add a note to", "annotate"),
        ("Write a comment on {a}", "Add a note to {a}"),
        takes_id=True,
        own_arguments=("text text",),
        extra=("author given", "pinned flag"),
    ),
    Action(
        "share",
        1,
        ("share", "forward", "export"),
        ("share", "forward", "send"),
        ("Share {a} by email", "Send {a} to somebody"),
        takes_id=True,
        own_arguments=("email email",),
        extra=("access one_of read/write/admin", "message text", "days few"),
    ),
    Action(
        "newest",
        2,
        ("latest", "newest", "last"),
        ("give me the latest", "show the newest", "find the last", "what is the latest"),
        ("Get the latest {the}", "The newest {the} that matches"),
        fields=(1, 1),
    ),
    Action(
        "count",
        2,
        ("count", "tally", "number of"),
        ("count the", "how many", "tell me the number of"),
        ("Count {all}", "How many {all} there are"),
        fields=(1, 2),
    ),
    Action(
        "schedule",
        2,
        ("schedule", "plan", "book"),
        ("schedule", "plan", "book", "arrange"),
        ("Schedule {a}", "Plan {a} for a day"),
        takes_id=True,
        own_arguments=("day date", "time clock"),
        extra=("minutes minutes", "remind flag"),
    ),
    Action(
        "tag",
        2,
        ("tag", "label", "mark"),
        ("tag", "label", "mark", "put labels on"),
        ("Add tags to {a}", "Label {a}"),
        takes_id=True,
        own_arguments=("tags words",),
    ),
    Action(
        "archive",
        2,
        ("archive", "close", "retire"),
        ("archive", "close", "retire", "file away"),
        ("Archive {a}", "Close {a}"),
        takes_id=True,
        extra=("years few", "reason title"),
    ),
)
BY_KEY = {action.key: action for action in ACTIONS}

"""`python -m dist_lm lm-eval RUN --tasks ...`: our engine as a model of lm-evaluation-harness (package lm_eval).

Texts are tokenized as its `hf` backend does with our export, so that figures are comparable. Log-likelihoods compute
each context once for all its continuations (`dist_lm.generation.likelihood`). Tasks that execute generated code are
refused: the harness would run it with the rights of the user.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dist_lm.chat.jinja_text import rendered
from dist_lm.chat.kept_template import Splitter, turn_ends
from dist_lm.chat.messages import ChatError
from dist_lm.chat.template import chat_template
from dist_lm.errors import ArtefactError, ConfigError, UserError, require
from dist_lm.generation.likelihood import Likelihood, Tree, likelihoods
from dist_lm.generation.load import LoadedModel, load_model
from dist_lm.generation.request import Request, SamplingParams, only_answers
from dist_lm.generation.session import build_engine
from dist_lm.model.keyed_random import hash_words, signed
from dist_lm.parallel.mesh import option_device
from dist_lm.storage import durable
from dist_lm.tokenizer.symbols import END, END_OF_TEXT
from dist_lm.tokenizer.tokenizer import KeptTemplate

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
except ImportError as missing:
    raise UserError(f"lm-eval: {missing}: pip install 'dist_lm[lm_eval]'") from missing

SEQUENCES = 32  # the cache holds this many whole contexts, up to CACHE_TOKENS
CACHE_TOKENS = 65536
NO_DAY = "2000-01-01"  # our own template asks for none
NEW_TOKENS = 256  # of an answer, unless the task says otherwise; as in the hf backend
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXECUTES = "HF_ALLOW_CODE_EVAL"  # the variable that lets the package evaluate run code
WAY_OUT = "the harness would run generated code without a sandbox: use stage=evaluate, which has one"


@dataclass(frozen=True)
class HarnessOptions:
    """Options of the verb, by the names of lm_eval."""

    tasks: Sequence[str]
    num_fewshot: int | None = None  # None: what the task says
    limit: float | None = None  # documents of a task; below 1: a share
    apply_chat_template: bool = False
    system_instruction: str | None = None
    include_path: Path | None = None  # folder with task files of your own
    gen_kwargs: str | None = None
    seed: int = 1234
    defaults: bool = field(default=True, repr=False)  # whether the tasks of lm_eval are known


class EngineModel(TemplateLM):
    """A checkpoint as a model of the harness."""

    def __init__(self, loaded: LoadedModel, device: torch.device, dtype: torch.dtype | None, seed: int = 1234) -> None:
        """`dtype`: None: that of `build_engine`."""
        super().__init__()
        self.name = loaded.name
        self._marks, self._seed = loaded.tokenizer, seed
        self._device = device
        self._context = loaded.config.max_seq_len
        self._engine = build_engine(loaded, device, SEQUENCES, CACHE_TOKENS, dtype=dtype)
        kept = loaded.tokenizer.kept_template
        (begin,) = loaded.tokenizer.pieces([loaded.tokenizer.opening.first])
        own = loaded.run.chat_template if loaded.run else None
        text = own.read_text(encoding="utf-8") if own and own.is_file() else chat_template()
        self._template = kept or KeptTemplate(text.replace(END_OF_TEXT, begin), (), NO_DAY)
        self._texts = Splitter(loaded.tokenizer)
        self._chats = False
        bos = loaded.tokenizer.file_names.get(dict(kept.special_tokens).get("bos_token", "")) if kept else None
        self._bos = loaded.tokenizer.opening.first if bos is None else bos
        ends = loaded.tokenizer.special_ids.get(END)
        self._ends = turn_ends(loaded.tokenizer) if kept else () if ends is None else (ends,)

    # What the harness asks about the model

    @property
    def eot_token_id(self) -> int:
        return self._marks.eot_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one."""
        return self._bos

    @property
    def max_length(self) -> int:
        return self._context

    @property
    def tokenizer_name(self) -> str:
        return self._marks.sha256

    def get_model_info(self) -> dict[str, Any]:
        """Facts for the results."""
        return {"model_name": self.name, "model_dtype": str(self._engine.decoder.dtype)}

    # Texts

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens as transformers encodes a text: special tokens that the tokenizer's file puts first, then the text.

        Marks are read only in what the chat template wrote; a text that spells one stays text.
        """
        own = self._texts.tokens(string) if self._chats else self._marks.encode(string)
        opening = self._marks.opening_ids if add_special_tokens in (None, True) else ()
        return own if own[:1] == [self._bos] and add_special_tokens is None else [*opening, *own]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._template.text if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without `add_generation_prompt` it ends inside the last turn.

        Raises:
            UserError: the template refuses the conversation.
        """
        self._chats = True
        turns = [{**turn, "content": self._texts.guarded(turn["content"])} for turn in chat_history]
        try:
            text = rendered(self._template, turns, None, add_generation_prompt)
        except ChatError:
            if all(turn["role"] != "system" for turn in turns):
                raise
            turns = [turn for turn in turns if turn["role"] != "system"]  # as the hf backend
            text = rendered(self._template, turns, None, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = turns[-1]["content"].rstrip()
        return text[: text.rindex(last) + len(last)]

    # What the harness asks for

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        groups: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for context, continuation in pairs:
            groups.setdefault(context, {})[continuation] = None
        trees = [Tree(context, tuple(own)) for context, own in groups.items()]
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], Likelihood] = {}
        done = likelihoods(self._engine.decoder, trees, self._device)
        with tqdm(total=len(found), desc="log-likelihoods", disable=disable_tqdm) as progress:
            progress.total = sum(len(tree.continuations) for tree in trees)
            for tree, values in zip(trees, done, strict=True):
                found |= {(tree.context, one): value for one, value in zip(tree.continuations, values, strict=True)}
                progress.update(len(values))
        results = [(found[pair].total, found[pair].is_greedy) for pair in pairs]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:  # a window of a longer text has none
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Cut the beginning of a context that is too long; the last token of a continuation takes no place."""
        if not 0 < len(continuation) <= self._context:
            raise UserError(
                f"lm-eval: a continuation has {len(continuation):,} tokens; expected 1 to model.max_seq_len="
                f"{self._context}: take another task, or a model with a longer context"
            )
        return tuple(context[-(self._context + 1 - len(continuation)) :]), tuple(continuation)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, nats, in windows of the model's context."""
        windows: list[tuple[int, tuple[list[int], list[int]]]] = []
        for number, request in enumerate(requests):
            parts = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self._context, context_len=1
            )
            windows += [(number, utils.make_disjoint_window(part)) for part in parts]
        asked: list[Any] = [(None, *window) for _, window in windows]
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(asked, disable_tqdm)
        for (number, _), (total, _) in zip(windows, found, strict=True):
            totals[number] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each context, up to a stop text."""
        texts, stops = [""] * len(requests), list[list[str]]()
        for number, request in enumerate(requests):
            context, kwargs = request.args
            options: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, NEW_TOKENS))
            stops.append([stop for stop in options["until"] if stop])
            params = self._params(options)
            space = self._context - params.max_new_tokens
            require(space > 0, "max_gen_toks", params.max_new_tokens, f"fewer than model.max_seq_len={self._context}")
            tokens = self.tok_encode(context)[-space:]
            self._engine.submit(Request(str(number), tokens, params, signed(hash_words(self._seed, number))))
        answers = only_answers(self._engine.results(), self.name)
        for done in tqdm(answers, total=len(requests), desc="answers", disable=disable_tqdm):
            text = done.text
            for stop in stops[int(done.request)]:
                text = text.split(stop)[0]
            texts[int(done.request)] = text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _params(self, options: dict[str, Any]) -> SamplingParams:
        """The sampling parameters of a task.

        Raises:
            ConfigError: names an option that the engine lacks.
        """
        until = tuple(stop for stop in options.pop("until") if stop and stop not in self._marks.file_names)
        sampled = options.pop("do_sample", False)
        given: dict[str, Any] = {"temperature": options.pop("temperature", 1.0) if sampled else 0.0}
        for key in ("top_k", "top_p", "min_p", "repetition_penalty"):
            if key in options:
                given[key] = options.pop(key)
        new = options.pop("max_gen_toks")
        if options:
            raise ConfigError(
                f"gen_kwargs {', '.join(options)}: expected until, max_gen_toks, do_sample, temperature, top_k, top_p, "
                "min_p or repetition_penalty"
            )
        return SamplingParams(max_new_tokens=new, stop=until, stop_tokens=self._ends, **given)


# --- tasks ---


def refuse_code(manager: TaskManager, names: Sequence[str]) -> None:
    """Refuse unknown tasks, and tasks that execute code, before any of their own code is imported.

    Raises:
        ConfigError: names the task.
    """
    require(EXECUTES not in os.environ, EXECUTES, os.environ.get(EXECUTES), f"not to be set: {WAY_OUT}")
    index, seen = manager.task_index, set[str]()

    def look(spec: str | Mapping[str, Any], above: str) -> None:
        if not isinstance(spec, str):
            check(spec, str(spec.get("task") or spec.get("group") or above))
            return
        if spec in seen:
            return
        seen.add(spec)
        if spec in index:
            entry = index[spec]
            for task in entry.tags if entry.cfg is None else ():
                look(task, spec)
            check(entry.cfg or {}, spec)
        elif Path(spec).is_file():
            check(load_yaml(Path(spec), resolve_func=False), spec)
        else:
            raise ConfigError(
                f"--tasks={spec}: no task, group or tag of lm_eval, and no file: `lm-eval ls tasks` names all"
            )

    def check(config: Mapping[str, Any], name: str) -> None:
        if config.get("unsafe_code") or "code_eval" in str(config.get("metric_list")):
            raise ConfigError(f"--tasks={name}: it executes code that the model writes, and {WAY_OUT}")
        parts = config.get("task")
        for part in parts if isinstance(parts, list) else ():
            look(part, name)

    for name in names:
        look(name, name)


def run_harness(model: EngineModel, options: HarnessOptions) -> dict[str, Any]:
    """Evaluate tasks; returns the results of lm_eval.

    Raises:
        ConfigError: names the task that does not exist or executes code.
        ArtefactError: the data of a task is not here and cannot be fetched.
    """
    include = str(options.include_path) if options.include_path else None
    manager = TaskManager(include_path=include, include_defaults=options.defaults)
    wanted = [name for task in options.tasks for name in (manager.match_tasks([task]) or [task])]
    refuse_code(manager, wanted)
    passed = {
        key: value for key, value in asdict(options).items() if key not in ("tasks", "include_path", "seed", "defaults")
    }
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        found = simple_evaluate(
            model, tasks=list(wanted), task_manager=manager, **passed, **dict.fromkeys(seeds, options.seed)
        )
    except (ConnectionError, FileNotFoundError) as error:  # of the package datasets
        raise ArtefactError(
            f"--tasks={','.join(wanted)}: their data is not on this machine and cannot be fetched: {error}. Fetch it "
            "where there is a network, or write a task that reads your files (docs/lm_eval.md)"
        ) from error
    assert found is not None
    return dict(found)


def evaluate(
    path: Path,
    options: HarnessOptions,
    tokenizer: Path | None,
    device: str,
    dtype: str,
    output: Path | None,
    samples: Path | None,
) -> None:
    """Run the verb: print the table of lm_eval, write its results.

    Raises:
        UserError: names the option, the task, or the fault of the checkpoint.
    """
    require(dtype in ("auto", *DTYPES), "--dtype", dtype, f"auto, {' or '.join(DTYPES)}")
    require(options.limit is None or options.limit > 0, "--limit", options.limit, "more than 0")
    for key, file in (("--output", output), ("--samples", samples)):
        require(file is None or file.absolute().parent.is_dir(), key, file, "a file in a folder that exists")
    include = options.include_path
    require(include is None or include.is_dir(), "--include_path", include, "a folder with task files")
    names = list(chain.from_iterable(one.split(",") for one in options.tasks))
    require(bool(names) and all(names), "--tasks", ",".join(options.tasks), "names of tasks, such as arc_easy,piqa")
    chosen = option_device(device)
    model = EngineModel(load_model(path, tokenizer), chosen, DTYPES.get(dtype), options.seed)
    found = run_harness(model, replace(options, tasks=names))
    own = found.pop("samples", {})
    print(model.name)
    print(utils.make_table(found))
    if found.get("groups"):
        print(utils.make_table(found, "groups"))
    if output:
        durable.write_text(output, _json(found, indent=2) + "\n")
    if samples:
        lines = (_json({"task": task} | one) for task, several in own.items() for one in several)
        durable.write_text(samples, "".join(line + "\n" for line in lines))


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, default=utils.handle_non_serializable)

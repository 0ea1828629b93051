"""`python -m dist_lm lm-eval RUN --tasks ...`: run lm-evaluation-harness (package lm_eval) on our engine.

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
from dist_lm.storage import durable, outputs
from dist_lm.tokenizer.symbols import END, END_OF_TEXT
from dist_lm.tokenizer.tokenizer import KeptTemplate
from dist_lm.tracking.readable import say

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
NO_DAY = "2000-01-01"  # our own template does not use the day
NEW_TOKENS = 256  # most tokens of an answer, unless the task says otherwise; the hf backend has the same
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXECUTES = "HF_ALLOW_CODE_EVAL"  # the variable that lets the package evaluate run code
WAY_OUT = "the harness would run generated code without a sandbox: use stage=evaluate, which has one"


@dataclass(frozen=True)
class HarnessOptions:
    """Options of the verb, by the names of lm_eval."""

    tasks: Sequence[str]
    num_fewshot: int | None = None  # None: the task's own number
    limit: float | None = None  # most documents of a task; below 1: a share
    apply_chat_template: bool = False
    system_instruction: str | None = None
    include_path: Path | None = None  # folder with the user's task files
    gen_kwargs: str | None = None
    seed: int = 1234
    defaults: bool = field(default=True, repr=False)  # whether the tasks of lm_eval are known


class EngineModel(TemplateLM):
    """A model of the harness that computes with our engine."""

    def __init__(self, loaded: LoadedModel, device: torch.device, dtype: torch.dtype | None, seed: int = 1234) -> None:
        """Builds the engine of a model on `device`, and chooses its chat template: that of an imported model, of its
        run, or ours.

        Args:
            dtype: dtype of the weights; None: chosen by `build_engine`.
            seed: seed of sampled answers.

        Raises:
            ArtefactError, ConfigError: as `build_engine`.
        """
        super().__init__()
        self.name = loaded.name
        self._tokenizer = loaded.tokenizer
        self._seed = seed
        self._device = device
        self._context = loaded.config.max_seq_len
        self._engine = build_engine(loaded, device, SEQUENCES, CACHE_TOKENS, dtype=dtype)

        # The template of an imported model comes first, then that of the run, then ours.
        self._splitter = Splitter(loaded.tokenizer)
        self._is_chat = False  # whether the harness has applied the template
        imported_template = loaded.tokenizer.kept_template
        if imported_template:
            self._template = imported_template
            self._ends = turn_ends(loaded.tokenizer)
        else:
            path = loaded.run.chat_template if loaded.run else None
            text = path.read_text(encoding="utf-8") if path and path.is_file() else chat_template()
            (opening,) = loaded.tokenizer.pieces([loaded.tokenizer.first_token.id])
            self._template = KeptTemplate(text.replace(END_OF_TEXT, opening), (), NO_DAY)
            end_id = loaded.tokenizer.special_ids.get(END)
            self._ends = () if end_id is None else (end_id,)

        self._bos = loaded.tokenizer.first_token.id
        if imported_template:
            bos_name = dict(imported_template.special_tokens).get("bos_token", "")
            self._bos = loaded.tokenizer.special_ids_in_file.get(bos_name, self._bos)

    # Properties that the harness reads

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """Token id of the context of a text that has no context."""
        return self._bos

    @property
    def max_length(self) -> int:
        return self._context

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.sha256

    def get_model_info(self) -> dict[str, Any]:
        """Returns facts about the model for the results."""
        return {"model_name": self.name, "model_dtype": str(self._engine.decoder.dtype)}

    # Texts

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the ids of transformers: special tokens that the tokenizer's file puts first, then the text.

        Without them if `add_special_tokens` is False, or if it is None and the text begins with the opening itself.
        Marks are read only in what the chat template wrote; a text that spells one stays text.
        """
        ids = self._splitter.tokens(string) if self._is_chat else self._tokenizer.encode(string)
        if add_special_tokens is None and ids[:1] == [self._bos]:
            return ids  # the chat template wrote the opening
        opening = self._tokenizer.first_ids if add_special_tokens in (None, True) else ()
        return [*opening, *ids]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if chat_template:
            return self._template.text
        return None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the text of a conversation, to be encoded by `tok_encode`, which reads marks from the first call on.

        Names of special tokens in the contents are split by the private character of `Splitter`, so that they become
        plain text. Without `add_generation_prompt` the text ends with the content of the last turn, without spaces at
        its end. If the template refuses system turns, they are left out.

        Raises:
            ChatError: the template refuses the conversation, also without system turns.
        """
        self._is_chat = True
        turns = [{**turn, "content": self._splitter.guarded(turn["content"])} for turn in chat_history]
        try:
            text = rendered(self._template, turns, None, add_generation_prompt)
        except ChatError:
            # Some templates know no system turn. The hf backend leaves it out, too.
            if all(turn["role"] != "system" for turn in turns):
                raise
            turns = [turn for turn in turns if turn["role"] != "system"]
            text = rendered(self._template, turns, None, add_generation_prompt)

        if add_generation_prompt:
            return text
        last_content = turns[-1]["content"].rstrip()
        return text[: text.rindex(last_content) + len(last_content)]

    # Computations that the harness calls

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Returns (log-likelihood in nats, whether every token is the greedy choice) of each request, in order.

        A context that is too long loses its beginning.

        Args:
            requests: (texts or None, context ids, continuation ids). With texts, scores go to the harness's cache.
            disable_tqdm: shows no bar.

        Raises:
            UserError: a continuation is empty or longer than the model's context.
        """
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]

        # A context is computed once for all its continuations.
        continuations_of: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for context, continuation in pairs:
            continuations_of.setdefault(context, {})[continuation] = None
        trees = [Tree(context, tuple(continuations)) for context, continuations in continuations_of.items()]

        likelihood_of: dict[tuple[tuple[int, ...], tuple[int, ...]], Likelihood] = {}
        computed = likelihoods(self._engine.decoder, trees, self._device)
        num_continuations = sum(len(tree.continuations) for tree in trees)
        with tqdm(total=num_continuations, desc="log-likelihoods", disable=disable_tqdm) as progress:
            for tree, tree_likelihoods in zip(trees, computed, strict=True):
                for continuation, likelihood in zip(tree.continuations, tree_likelihoods, strict=True):
                    likelihood_of[tree.context, continuation] = likelihood
                progress.update(len(tree_likelihoods))

        scores = [(likelihood_of[pair].total, likelihood_of[pair].is_greedy) for pair in pairs]
        for (texts, _, _), score in zip(requests, scores, strict=True):
            if texts is not None:  # a window of a longer text has no texts
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns context and continuation; the beginning of a context that is too long is cut off.

        The last token of a continuation is predicted only, so it takes no place in the model's context.

        Raises:
            UserError: the continuation is empty or longer than the context.
        """
        if not 0 < len(continuation) <= self._context:
            raise UserError(
                f"lm-eval: a continuation has {len(continuation):,} tokens; expected 1 to model.max_seq_len="
                f"{self._context}: take another task, or a model with a longer context"
            )
        return tuple(context[-(self._context + 1 - len(continuation)) :]), tuple(continuation)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text, in nats; a long text is cut to windows of the model's context, of
        which each token counts once. Results go to the harness's cache.

        Args:
            requests: of lm_eval, each with one text.

        Raises:
            UserError: the engine refuses a window.
        """
        windows: list[tuple[list[int], list[int]]] = []
        text_of: list[int] = []  # index of the text of each window
        for index, request in enumerate(requests):
            parts = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self._context, context_len=1
            )
            for part in parts:
                windows.append(utils.make_disjoint_window(part))
                text_of.append(index)

        totals = [0.0] * len(requests)
        window_requests: list[Any] = [(None, *window) for window in windows]
        for index, (total, _) in zip(text_of, self._loglikelihood_tokens(window_requests, disable_tqdm), strict=True):
            totals[index] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns an answer to each context, in order, up to a stop text that is not part of it. Long contexts lose
        their beginning. Answers go to the harness's cache.

        Args:
            requests: of lm_eval, each with (context, options).

        Raises:
            ConfigError: an option that the engine lacks or refuses, or no space for an answer.
            RequestError: a context is empty.
            ArtefactError: the model's logits are not numbers.
        """
        stops: list[list[str]] = []
        for number, request in enumerate(requests):
            context, kwargs = request.args
            options: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, NEW_TOKENS))
            stops.append([stop for stop in options["until"] if stop])
            params = self._params(options)
            space = self._context - params.max_new_tokens
            require(space > 0, "max_gen_toks", params.max_new_tokens, f"fewer than model.max_seq_len={self._context}")
            tokens = self.tok_encode(context)[-space:]
            self._engine.submit(Request(str(number), tokens, params, signed(hash_words(self._seed, number))))

        texts = [""] * len(requests)
        answers = only_answers(self._engine.results(), self.name)
        for answer in tqdm(answers, total=len(requests), desc="answers", disable=disable_tqdm):
            text = answer.text
            for stop in stops[int(answer.request)]:
                text = text.split(stop)[0]
            texts[int(answer.request)] = text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _params(self, options: dict[str, Any]) -> SamplingParams:
        """Returns the sampling parameters of a task: greedy unless it has `do_sample`; removes them from `options`.

        Raises:
            ConfigError: names an option that the engine lacks, or a value out of bounds.
        """
        # A generated text never holds the name of a special token.
        until = tuple(stop for stop in options.pop("until") if stop and stop not in self._tokenizer.special_ids_in_file)
        do_sample, temperature = options.pop("do_sample", False), options.pop("temperature", 1.0)
        # lm_eval also gives a temperature to tasks that do not sample.
        filters: dict[str, Any] = {"temperature": temperature if do_sample else 0.0}
        for key in ("top_k", "top_p", "min_p", "repetition_penalty"):
            if key in options:
                filters[key] = options.pop(key)
        max_new_tokens = options.pop("max_gen_toks")
        if options:
            raise ConfigError(
                f"gen_kwargs {', '.join(options)}: expected until, max_gen_toks, do_sample, temperature, top_k, top_p, "
                "min_p or repetition_penalty"
            )
        return SamplingParams(max_new_tokens=max_new_tokens, stop=until, stop_tokens=self._ends, **filters)


# --- tasks ---


def refuse_code(manager: TaskManager, names: Sequence[str]) -> None:
    """Refuses unknown tasks, and tasks that execute code, before any of their own code is imported.

    Args:
        names: tasks, groups or tags of lm_eval, or files.

    Raises:
        ConfigError: names the task; or the environment variable EXECUTES, which allows code, is set.
    """
    require(EXECUTES not in os.environ, EXECUTES, os.environ.get(EXECUTES), f"not to be set: {WAY_OUT}")
    index = manager.task_index
    visited: set[str] = set()

    # A task may be a group or a tag of others, which may be groups in turn.
    def visit(spec: str | Mapping[str, Any], parent: str) -> None:
        if not isinstance(spec, str):
            check(spec, str(spec.get("task") or spec.get("group") or parent))
            return
        if spec in visited:
            return
        visited.add(spec)

        if spec in index:
            entry = index[spec]
            for task in entry.tags if entry.cfg is None else ():
                visit(task, spec)
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
            visit(part, name)

    for name in names:
        visit(name, name)


def run_harness(model: EngineModel, options: HarnessOptions) -> dict[str, Any]:
    """Evaluates tasks and returns the results of lm_eval, with the samples; their data may be downloaded.

    lm_eval sets the seeds of Python, NumPy and torch to `options.seed`. Errors of a task's own code pass through.

    Raises:
        ConfigError: names the task that does not exist or executes code, or an option.
        ArtefactError: the data of a task is not here and cannot be fetched, or the model's logits are not numbers.
        UserError: a continuation is longer than the model's context, or the chat template refuses a conversation.
    """
    include_path = str(options.include_path) if options.include_path else None
    manager = TaskManager(include_path=include_path, include_defaults=options.defaults)
    names = [name for task in options.tasks for name in (manager.match_tasks([task]) or [task])]
    refuse_code(manager, names)

    ours = ("tasks", "include_path", "seed", "defaults")
    settings = {key: setting for key, setting in asdict(options).items() if key not in ours}
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        results = simple_evaluate(
            model, tasks=list(names), task_manager=manager, **settings, **dict.fromkeys(seeds, options.seed)
        )
    except (ConnectionError, FileNotFoundError) as error:  # raised by the package datasets
        raise ArtefactError(
            f"--tasks={','.join(names)}: their data is not on this machine and cannot be fetched: {error}. Fetch it "
            "where there is a network, or write a task that reads your files (docs/lm_eval.md)"
        ) from error
    assert results is not None
    return dict(results)


def evaluate(
    path: Path,
    options: HarnessOptions,
    tokenizer: Path | None,
    device: str,
    dtype: str,
    output: Path | None,
    samples: Path | None,
) -> None:
    """Runs the verb: prints the table of lm_eval, writes its results to `output` (JSON) and its samples to `samples`
    (lines).

    Args:
        path: run or checkpoint.
        options: its tasks may be names joined by commas.
        tokenizer: file of the tokenizer; None: that of the run or checkpoint.
        device: auto, cpu or cuda.
        dtype: auto, float32 or bfloat16.
        output: None, as for `samples`: not written.

    Raises:
        ConfigError: names the option or the task.
        ArtefactError: the checkpoint is missing or damaged, or data cannot be fetched.
        UserError: as `run_harness`.
        OSError: a file cannot be written.
    """
    require(dtype in ("auto", *DTYPES), "--dtype", dtype, f"auto, {' or '.join(DTYPES)}")
    require(options.limit is None or options.limit > 0, "--limit", options.limit, "more than 0")
    for key, file in (("--output", output), ("--samples", samples)):
        outputs.file_to_write(key, file)
    include_path = options.include_path
    require(include_path is None or include_path.is_dir(), "--include_path", include_path, "a folder with task files")
    names = list(chain.from_iterable(text.split(",") for text in options.tasks))
    require(bool(names) and all(names), "--tasks", ",".join(options.tasks), "names of tasks, such as arc_easy,piqa")

    torch_device = option_device(device)
    model = EngineModel(load_model(path, tokenizer), torch_device, DTYPES.get(dtype), options.seed)
    results = run_harness(model, replace(options, tasks=names))
    samples_of = results.pop("samples", {})

    say(model.name)
    say(utils.make_table(results))
    if results.get("groups"):
        say(utils.make_table(results, "groups"))
    if output:
        durable.write_text(output, _json(results, indent=2) + "\n")
    if samples:
        lines = [_json({"task": task} | sample) for task, of_task in samples_of.items() for sample in of_task]
        durable.write_text(samples, "".join(line + "\n" for line in lines))


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, default=utils.handle_non_serializable)

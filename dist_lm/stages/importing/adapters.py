"""The part of `dist-lm import` for adapters that peft saved: a run of adapters over a run of their base.

    work/runs/import/NAME/
      checkpoints/step_00000000/   the adapters, which name the checkpoint of the base
      tokenizer/ chat_template.jinja conf/model/NAME.yaml config.yaml   as of a whole model

The base becomes a run of its own, named after its folder or hub id, which adapters of the same base share. Weights that
peft stored whole (embeddings, `modules_to_save`) replace those of the base: then its run is NAME-base, for this alone.

One of our adapters has the rank and the scale of all others, and peft's need not. The largest rank is taken, and
smaller factors get rows of zeros; the scale of most adapters is alpha / rank, and other scales go into B. A weight of
GPT-NeoX that fuses queries, keys and values gives an adapter to each: the rows of A whose part of B is not 0.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.config.root import read_groups
from dist_lm.config.stage import LORA_TARGETS, LoraConfig
from dist_lm.errors import ArtefactError, ConfigError, one_line, shown_value
from dist_lm.generation.load import model_config_of, run_of, tokenizer_of
from dist_lm.interop.adapter_folder import CONFIG, PREFIX, SCORE, WEIGHTS, AdapterFolder, adapters_in
from dist_lm.interop.architectures import Architecture, architecture_of
from dist_lm.interop.snapshot import change_of, holds_tokenizer, model_in, name_of, named_base
from dist_lm.interop.snapshot_files import file_in
from dist_lm.interop.weights import Converted, converted
from dist_lm.model.lora import adapter_of
from dist_lm.model.size import ADAPTERS, Shape, is_trained, parameter_shapes
from dist_lm.stages.exporting.tensors import as_torch, made
from dist_lm.stages.importing.whole_model import (
    Words,
    appearing,
    import_snapshot,
    recorded,
    snapshot_at,
    write_checkpoint,
    write_configuration,
)
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.training import checkpoint_files as files
from dist_lm.training.adapters import record_of
from dist_lm.training.checkpoint_tensors import ComputedTensor, StoredTensor, tensors_in
from dist_lm.training.state import TrainState


def import_adapters(
    folder: Path, source: str, run: RunDirectory, base: str, say: Callable[[str], object]
) -> RunDirectory:
    """Writes `run` from a folder of adapters, and the run of their base unless it is there; each appears when it is
    complete.

    Args:
        source: what named the folder, which the run records.
        base: folder, hub id, or a run or checkpoint of ours; empty: what the adapters name (`named_base`).
        say: gets the line that names such a base, before it is read.

    Raises:
        ArtefactError: an option or a tensor is one that our adapters lack, they do not fit the base, or there is no
            such base; names the key, the tensor or the run.
        UserError: a package that is needed is not installed.
        OSError: a file cannot be written.
    """
    described = adapters_in(folder)
    path = file_in(folder, WEIGHTS)
    assert path is not None
    theirs = {name.removeprefix(PREFIX): tensor for name, tensor in tensors_in(path).items()}
    replaced = {name: theirs[name] for name in described.whole_weights if name != SCORE}

    if not base:
        base = named_base(folder)
        # Somebody else may have chosen it: nobody should find out later what the adapters were put over.
        say(f"{folder / CONFIG} names the base {one_line(base)}; --base names another")
    checkpoint, architecture = _base(folder, source, run, base, replaced)
    model = model_config_of(checkpoint)
    if SCORE in described.whole_weights:
        model = replace(model, head="scalar")
    parts = _Parts(folder, theirs, described, model, architecture)
    config = parts.config(str(checkpoint.resolve()), files.fingerprint(checkpoint))

    if holds_tokenizer(folder):
        words = Words.of(folder, model.vocab_size)
    else:
        words = _words_of(checkpoint)

    imported = {"source": source, "architecture": architecture.name, "snapshot": recorded(source, folder)}
    with appearing(run) as temporary:
        words.write(temporary)
        state = TrainState(tokenizer=words.tokenizer.sha256)
        # The path from the checkpoint to its base is that of the final run, beside which the temporary one lies.
        record = record_of(config, temporary.checkpoints / files.step_name(0))
        write_checkpoint(temporary.checkpoints, parts.parameters(config), config.plain, state, record)
        write_configuration(temporary, config.plain, imported)
    return run


def _base(
    folder: Path, source: str, run: RunDirectory, base: str, replaced: Mapping[str, StoredTensor]
) -> tuple[Path, Architecture]:
    """Returns the checkpoint of the base, which is imported if it is no run of ours, and the architecture of
    transformers whose names the adapters have.

    An import writes a run beside that of the adapters; an earlier import of the same model is used again.

    Args:
        folder, source, run: of the adapters.
        base: folder of a run or of a model, or a model of the hub.
        replaced: tensors of transformers that replace those of the base.

    Raises:
        ArtefactError: there is no such base, no architecture holds it, or a run with its name is of another one.
        UserError: the hub cannot be asked, or a package is not installed.
        OSError: a file cannot be read or written.
    """
    path = Path(base).expanduser()
    if path.is_dir() and not (path / "config.json").exists() and (own_checkpoint := _own_checkpoint(path)):
        architecture = architecture_of(model_config_of(own_checkpoint))
        if isinstance(architecture, str):
            raise ArtefactError(
                f"checkpoint {own_checkpoint}: no architecture of transformers holds it: {architecture}"
            )
        if replaced:
            raise ArtefactError(
                f"{folder / WEIGHTS}: {shown_value(next(iter(replaced)))} replaces a weight of {path}, a run: export "
                "the run, and name the folder of the export by --base"
            )
        return own_checkpoint, architecture

    with snapshot_at(base) as base_folder:
        _, architecture = model_in(base_folder, name_of(base))
        base_run = run.work.run(run.path.parent.name, name_of(base))
        if replaced or base_run.path == run.path:
            base_run = run.work.run(run.path.parent.name, f"{run.path.name}-base")

        if base_run.path.exists():
            imported = read_groups(base_run.config).get("imported", {})
            change = change_of(base, imported.get("snapshot") or {})
            if replaced or "changed_by" in imported or change:
                raise ArtefactError(
                    f"{base_run.path} exists, and is not {base}: remove it if nothing needs it, or give another NAME, "
                    "or a run by --base"
                )
        elif replaced:
            tokenizer_folder = folder if holds_tokenizer(folder) else base_folder
            import_snapshot(base_folder, base, base_run, replaced, tokenizer_folder, changed_by=source)
        else:
            import_snapshot(base_folder, base, base_run)
    return files.find_checkpoint(base_run.path), architecture


def _own_checkpoint(path: Path) -> Path | None:
    """Returns the checkpoint of a run of ours at `path`; None if there is none."""
    try:
        return files.require_intact(files.find_checkpoint(path))
    except ArtefactError:
        return None


def _words_of(checkpoint: Path) -> Words:
    """Returns the tokenizer and the chat template of the run of a base.

    Raises:
        ArtefactError: it has none.
    """
    run = run_of(checkpoint)
    tokenizer = tokenizer_of(checkpoint, None, run)
    template = ""
    if run and run.chat_template.is_file():
        template = run.chat_template.read_text(encoding="utf-8")
    path = Path(tokenizer.name)
    return Words(path.read_bytes(), path.name, tokenizer, template)


@dataclass(frozen=True)
class _Parts:
    """The tensors of adapters as our factors."""

    folder: Path
    theirs: Mapping[str, StoredTensor]  # their name without PREFIX -> tensor
    described: AdapterFolder
    model: ModelConfig  # the base, with the head of the adapters
    architecture: Architecture

    @cached_property
    def places(self) -> dict[str, tuple[Converted, int]]:
        """Our weights with an adapter -> the weight of transformers, and our index in it.

        Raises:
            ArtefactError: an adapter is of a weight that has none here, or its factors do not fit the weight.
        """
        # transformers has no name of its own for the factors, so each of its weights is looked up by ours.
        names = {name for name in parameter_shapes(self._adapted(LoraConfig(rank=1))) if name.endswith(".a")}

        conversion_and_part: dict[str, tuple[Converted, int]] = {}
        weights = dict(self.described.ranks)
        for conversion in converted(self.architecture, parameter_shapes(self.model)):
            if conversion.name not in weights or f"{adapter_of(conversion.ours[0])}a" not in names:
                continue

            rank = weights.pop(conversion.name)
            out, into = conversion.shape
            shapes = tuple(self._factor(conversion, factor).shape for factor in "AB")
            if shapes != ((rank, into), (out, rank)):
                raise ArtefactError(
                    f"{self.folder / WEIGHTS}: adapter of {conversion.name} has factors {shapes}, expected "
                    f"{((rank, into), (out, rank))} by the base"
                )
            conversion_and_part |= {name: (conversion, index) for index, name in enumerate(conversion.ours)}

        # The tensors left have no counterpart in the model.
        if weights:
            raise ArtefactError(
                f"{self.folder / WEIGHTS}: adapter of {shown_value(next(iter(weights)))}: expected weights of "
                "attention and of the feed-forward network of the base"
            )
        return conversion_and_part

    def config(self, base: str, base_sha256: str) -> AdaptedModelConfig:
        """Returns the model with its adapters: the largest rank, the scale of most, and all weights that have one.

        Raises:
            ArtefactError: an adapter does not fit the base.
        """
        rank = max(1, *(len(self._rows(name)) for name in self.places))
        scale = Counter(self.described.scales.values()).most_common(1)[0][0]
        adapted = {name.removesuffix(".weight").rpartition(".")[2] for name in self.places}
        targets = [weight for part in LORA_TARGETS.values() for weight in part if weight in adapted]
        try:
            return self._adapted(LoraConfig(rank, scale * rank, targets), base, base_sha256)
        except ConfigError as error:
            raise ArtefactError(f"{self.folder}: {error}") from error

    def parameters(self, config: AdaptedModelConfig) -> dict[str, ComputedTensor]:
        """Returns our trained parameters, fp32, computed when they are written.

        Raises:
            ArtefactError: the score has not one row.
        """
        shapes = {name: shape for name, shape in parameter_shapes(config).items() if is_trained(name, config)}
        weight_of = {adapter_of(name): name for name in self.places}
        parameters: dict[str, ComputedTensor] = {}
        for name, shape in shapes.items():
            make = partial(torch.zeros, shape)
            if ADAPTERS in name:
                weight = weight_of.get(name[:-1])
                # Layers that peft left out have no adapter: one of zeros changes nothing.
                if weight is not None:
                    make = partial(self._make, weight, name[-1], shape, config.scale)
            elif name == "scalar_head.weight":
                make = partial(self._score, shape)
            parameters[name] = made("F32", shape, make)
        return parameters

    def _adapted(self, lora: LoraConfig, base: str = "", base_sha256: str = "") -> AdaptedModelConfig:
        return AdaptedModelConfig.of(self.model, lora, base, base_sha256)

    def _factor(self, conversion: Converted, factor: str) -> StoredTensor:
        return self.theirs[f"{conversion.name.removesuffix('.weight')}.lora_{factor}.weight"]

    def _read(self, conversion: Converted, factor: str) -> torch.Tensor:
        return as_torch(self._factor(conversion, factor), f"{conversion.name}: lora_{factor}").float()

    def _b(self, name: str) -> torch.Tensor:
        """Returns the rows of peft's B that belong to our weight, (r, *output), in fp32."""
        conversion, index = self.places[name]
        b_OR = self._read(conversion, "B")
        if len(conversion.ours) == 1:
            return b_OR.t()
        heads, width = conversion.shapes[0][:2]
        return b_OR.view(heads, len(conversion.ours), width, -1)[:, index].permute(2, 0, 1)

    def _rows(self, name: str) -> list[int]:
        """Returns the rows of A that our weight needs: all, or in a fused weight those whose part of B is not 0."""
        conversion, _ = self.places[name]
        if len(conversion.ours) == 1:
            return list(range(self.described.ranks[conversion.name]))
        return self._b(name).flatten(1).any(1).nonzero().flatten().tolist()

    def _make(self, name: str, factor: str, shape: Shape, scale: float) -> torch.Tensor:
        """Returns our factor A or B, fp32, of `shape`, with rows of zeros up to the rank."""
        conversion, _ = self.places[name]
        if factor == "a":
            rows = self._read(conversion, "A")
        else:
            # All adapters of a run share a scale, so B takes the ratio where peft had another one.
            rows = self._b(name).flatten(1) * (self.described.scales[conversion.name] / scale)
        padded = torch.zeros(shape[0], rows.shape[1])
        rows = rows[self._rows(name)]
        padded[: len(rows)] = rows
        return padded.view(shape)

    def _score(self, shape: Shape) -> torch.Tensor:
        tensor = self.theirs[SCORE]
        if tensor.shape != shape:
            raise ArtefactError(f"{self.folder / WEIGHTS}: {SCORE} has shape {tensor.shape}, expected {shape}")
        return as_torch(tensor, SCORE)

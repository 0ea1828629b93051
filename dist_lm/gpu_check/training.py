"""Checks of training on one card: speed and memory of `large`, both optimizers, asynchronous saving."""

import math
import time
from collections.abc import Sequence

import torch

from dist_lm.config.model import ModelConfig
from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.data.stream import StepData
from dist_lm.dry_run.estimate import estimate_memory, estimate_work
from dist_lm.dry_run.rehearsal import random_batch, trainer_of_steps
from dist_lm.dry_run.work import step_seconds
from dist_lm.gpu_check.probe import Probe, expect
from dist_lm.model.keyed_random import initialise
from dist_lm.model.size import flops_per_token
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import adds_sums, build_mesh
from dist_lm.parallel.sharding import build_model, compute_dtype
from dist_lm.parallel.values import shard_of
from dist_lm.training import checkpoint
from dist_lm.training.checkpoint_saver import CheckpointSaver
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.profile_summary import read_profile, top_operators
from dist_lm.training.state import TrainState, advance
from dist_lm.training.step import StepResult
from dist_lm.training.step_meter import DeviceLaps, Laps, WallLaps, matmul_flops, peak_memory_gib
from dist_lm.training.step_profiler import StepProfiler

WARM_UP, TIMED = 2, 4  # numbers of steps
LARGE = ("model=large", "stage.seq_len=4096")
TINY = ("model=nano", "model.n_layers=2", "model.vocab_size=512", "stage.seq_len=64")


class Training:
    """Model, optimizer and trainer of a configuration on the ranks of a check."""

    def __init__(self, probe: Probe, config: Config, model: Transformer | None = None) -> None:
        """Builds model, optimizer and trainer (collective); an existing `model` is used instead of a new one.

        Raises:
            ConfigError: the layout does not fit the ranks.
        """
        self.config = config
        self.device = probe.world.device
        self.layout = resolve_layout(config.parallel, config.model, probe.world.size)
        mesh = build_mesh(self.layout, self.device)
        self.model = model or build_model(config.model, config.parallel, mesh, self.device, config.seed)

        self.optimizer = build_optimizer(self.model, config.stage, config.stage.muon)

        # A loss that several tensor-parallel ranks compute counts once.
        self.trainer = trainer_of_steps(config, probe.world, self.model, self.optimizer, next_token(), adds_sums(mesh))
        self.state = TrainState()

    def step(self, batches: Sequence[Batch], laps: Laps | None = None) -> StepResult:
        """Takes one optimizer step (collective)."""
        result = self.trainer.step(self.state, StepData(0, list(batches), 0), self.config.stage.lr, laps)
        self.state = advance(self.state, result, 0)
        return result

    def seconds_per_step(self, batches: Sequence[Batch]) -> float:
        """Returns the mean time of TIMED steps in seconds, after WARM_UP steps; the peak memory counts from there on.

        All of them are on the same micro-batches and change the model.

        Raises:
            CheckFailedError: a loss is not finite.
        """
        for _ in range(WARM_UP):
            self.step(batches)

        # The peak of the warm-up, which compiles, is not that of a step.
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.finish_on_device()

        started = time.perf_counter()
        for _ in range(TIMED):
            expect(math.isfinite(self.step(batches).loss), "the loss is not finite")

        self.finish_on_device()
        return (time.perf_counter() - started) / TIMED

    def finish_on_device(self) -> None:
        """Waits until the device has finished: CUDA runs asynchronously, and a clock would stop before a step ends."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def whole_model(config: ModelConfig, seed: int, device: torch.device) -> Transformer:
    """Returns a model that is not split over ranks, with the values that a training run with this seed begins with."""
    model = Transformer(config)
    initialise(model, seed)
    return model.to(device)


def large(probe: Probe) -> None:
    """Measures steps on 2 and 4 sequences, eager and compiled, beside the dry run's estimate; writes a profile.

    Raises:
        CheckFailedError: a loss is not finite.
        ConfigError: bf16 is asked for on a GPU without it.
        StrangerError: another user has connected to a port of this rank.
        ArtefactError: the profile is damaged.
    """
    config = probe.config(*LARGE, "parallel.compile=always", "stage.micro_batch=4", "stage.global_batch=4", tiny=TINY)
    training = Training(probe, config)
    peak = matmul_flops(training.device, compute_dtype(config.parallel, training.device), config.hardware)

    for sequences in (2, 4):
        estimate(probe, training, sequences)
        with torch.compiler.set_stance("force_eager"):
            note_speed(probe, training, "eager", sequences, peak)
        note_speed(probe, training, "compiled", sequences, peak)

        if sequences == 2:
            # Otherwise the next size would get kernels for any size.
            torch.compiler.reset()

    profile(probe, training, batches_of(training, 4))


def batches_of(training: Training, sequences: int) -> list[Batch]:
    """Returns one micro-batch of random tokens; each sequence is one document."""
    stage = training.config.stage
    stage.micro_batch = sequences
    return [random_batch(training.config).to(training.device)]


def note_speed(probe: Probe, training: Training, mode: str, sequences: int, peak: float) -> None:
    """Notes speed (tokens/s, MFU) and peak memory (GiB) of steps on one micro-batch.

    Args:
        sequences: number of sequences of the micro-batch.
        peak: peak FLOP/s of one device; 0: MFU is not noted.

    Raises:
        CheckFailedError: a loss is not finite.
    """
    config = training.config
    name = f"{mode} {sequences}x{config.stage.seq_len}"
    tokens = sequences * config.stage.seq_len * training.layout.dp
    seconds = training.seconds_per_step(batches_of(training, sequences))

    probe.note(f"{name} tokens/s", tokens / seconds)

    if peak:
        flops = flops_per_token(config.model, config.stage.seq_len) * tokens
        probe.note(f"{name} MFU %", 100 * flops / seconds / peak / probe.world.size)

    probe.note(f"{name} memory GiB", peak_memory_gib(training.device))


def estimate(probe: Probe, training: Training, sequences: int) -> None:
    """Notes the dry run's estimate of a step, tokens/s and GiB; nothing in a rehearsal, or on a device that
    `config.hardware` does not describe.

    Sets micro_batch and global_batch of the training's configuration to `sequences`.
    """
    # conf/hardware does not know this card.
    if training.config.hardware.device != training.device.type:
        return

    config = training.config
    name = f"dry run {sequences}x{training.config.stage.seq_len}"
    config.stage.micro_batch = config.stage.global_batch = sequences
    seconds = step_seconds(estimate_work(config, training.layout), training.layout, config.hardware)
    memory = estimate_memory(config, training.layout).peak

    # A tiny step is mostly overhead, which the estimate leaves out.
    if probe.rehearsal:
        return

    probe.note(f"{name} tokens/s", sequences * config.stage.seq_len / seconds)
    probe.note(f"{name} memory GiB", memory / 2**30)


def profile(probe: Probe, training: Training, batches: Sequence[Batch]) -> None:
    """Takes four steps; writes a trace of two of them (Perfetto) and a list of operators, and notes compute and idle
    time of a step in percent; on a GPU also how often the host waited, and copies from pageable memory.

    Raises:
        ArtefactError: the profile is damaged.
    """
    on_gpu = training.device.type == "cuda"
    trace = probe.folder / "trace.json.gz"
    laps = laps_on(training.device)

    with StepProfiler((2, 3), on_gpu, trace, probe.folder / "memory.pickle") as profiler:
        for completed in range(4):
            profiler.reached(completed)
            training.step(batches, profiler.marked(laps))

    summary = read_profile(trace)
    lines = [
        f"{1e3 * seconds:10.2f} ms  {calls:8,.0f} calls  {name}" for name, calls, seconds in top_operators([summary])
    ]
    (probe.folder / "operators.txt").write_text("\n".join(lines) + "\n")

    for label, seconds in (("compute", summary.compute), ("idle", summary.idle)):
        probe.note(f"profile, {label} %", 100 * seconds / summary.step)
    if on_gpu:
        probe.note("profile, host waits/step", summary.waits)
        probe.note("profile, pageable copies/step", summary.pageable)


def laps_on(device: torch.device) -> Laps:
    """Returns laps that time the work of a device."""
    return DeviceLaps(device) if device.type == "cuda" else WallLaps()


def optimizers(probe: Probe) -> None:
    """Checks that the loss on a batch falls with each optimizer; notes the time of an update (ms) and the fall (nats).

    Raises:
        CheckFailedError: it does not fall.
        ConfigError: bf16 is asked for on a GPU without it.
        StrangerError: another user has connected to a port of this rank.
    """
    model = None
    shape = (*LARGE, "stage.micro_batch=1", "stage.lr=3e-4", "parallel.compile=never")
    for name, settings in (("AdamW", ()), ("Muon", ("stage.muon.lr=0.02",))):
        training = Training(probe, probe.config(*shape, *settings, tiny=TINY), model)
        model = training.model
        batches = batches_of(training, 1)

        laps = laps_on(training.device)
        # The first steps allocate the moments; their time does not count.
        losses = [training.step(batches, laps).loss for _ in range(WARM_UP)]
        training.finish_on_device()
        laps.take()

        losses += [training.step(batches, laps).loss for _ in range(TIMED)]
        training.finish_on_device()

        probe.note(f"{name} ms", 1e3 * laps.take()["optimizer"] / TIMED)
        probe.note(f"{name}, loss fell nats", losses[0] - losses[-1])
        expect(losses[-1] < losses[0], f"{name}: the loss on one batch went from {losses[0]:.4f} to {losses[-1]:.4f}")
        # Frees its moments before the next ones are allocated.
        del training


def save(probe: Probe) -> None:
    """Saves after two steps while two more run, loads into another model, and takes the same two steps there.

    Notes the pause of the steps, the time until the checkpoint is written, its size and the error of the losses.

    Raises:
        CheckFailedError: there is no intact checkpoint, a loaded tensor differs, or losses differ by more than 1e-4.
        CheckpointWriteError: the checkpoint could not be written.
        ArtefactError: no checkpoint can be loaded.
        ConfigError: bf16 is asked for on a GPU without it.
        StrangerError: another user has connected to a port of this rank.
    """
    config = probe.config("model=medium", "stage.seq_len=1024", "stage.micro_batch=4", "stage.lr=1e-3", tiny=TINY)
    first = Training(probe, config)

    batches = [batches_of(first, config.stage.micro_batch) for _ in range(4)]
    checkpoints = probe.folder / "checkpoints"
    checkpoints.mkdir()

    with CheckpointSaver(checkpoints, config.model, probe.world, keep=1, asynchronous=True) as saver:
        for step_batches in batches[:2]:
            first.step(step_batches)

        # Copies of the tensors as they are now: the steps below overwrite them while the save runs.
        saved_tensors = {
            name: shard_of(tensor).clone()
            for name, tensor in checkpoint.tensors_of(first.model, first.optimizer, config.model).items()
        }

        started = time.perf_counter()
        state = first.state
        saver.save(first.model, first.optimizer, state)

        probe.note("pause s", time.perf_counter() - started)
        losses = [first.step(step_batches).loss for step_batches in batches[2:]]
        saver.wait()
        probe.note("written after s", time.perf_counter() - started)

    path = checkpoint.newest_intact(checkpoints, probe.world)
    expect(path is not None, f"no checkpoint in {checkpoints}")
    assert path
    probe.note("size GiB", sum(file.stat().st_size for file in path.iterdir()) / 2**30)

    # Another seed, so that no tensor is right without being loaded.
    config.seed += 1
    second = Training(probe, config)
    second.state = checkpoint.load(path, second.model, second.optimizer, config.model)
    expect(second.state == state, f"saved {state}, loaded {second.state}")

    loaded = checkpoint.tensors_of(second.model, second.optimizer, config.model)
    differ = [name for name, tensor in saved_tensors.items() if not torch.equal(tensor, shard_of(loaded[name]))]
    expect(not differ, f"{len(differ)} tensors differ from those saved, the first is {next(iter(differ), '')}")

    resumed_losses = [second.step(step_batches).loss for step_batches in batches[2:]]
    error = max(abs(resumed_loss / loss - 1) for resumed_loss, loss in zip(resumed_losses, losses, strict=True))
    probe.note("resumed, loss error", error)
    expect(error <= 1e-4, f"losses {losses} became {resumed_losses} after resuming")

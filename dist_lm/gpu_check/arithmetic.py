"""Checks of arithmetic against a higher precision or the CPU: attention kernels, keyed randomness, a compiled step.

Dimensions: B sequences, T tokens, H query heads, G key/value heads, K d_head, D d_model.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch._dynamo.utils import counters

from dist_lm.data.batch import Batch
from dist_lm.generation.sampling import uniform
from dist_lm.gpu_check.probe import Probe, expect
from dist_lm.gpu_check.training import Training
from dist_lm.model.attention import CAUSAL, Visibility, attend, within_documents, within_window
from dist_lm.model.keyed_random import DropoutKey, dropout_sites, keep_mask
from dist_lm.training.step import StepResult

VisibilityOf = Callable[[torch.device, torch.dtype], Visibility]  # the mask on a device, for queries of a dtype
HALF = torch.bfloat16
# The largest error of an output or a gradient in bf16, relative to the largest value.
HALF_ERROR = 0.02
# For each dtype: the higher precision that it is compared with, and its largest error.
REFERENCES = {HALF: (torch.float32, HALF_ERROR), torch.float32: (torch.float64, 1e-4)}


def varlen(probe: Probe) -> None:
    """Checks packed documents in the variable-length kernel, with one key head for each query head and with groups.

    Notes the errors of output and gradients.

    Raises:
        CheckFailedError: the kernel is not used, or an error is above its limit.
    """
    rows, tokens, heads, key_heads, width = probe.sized((2, 2048, 25, 5, 64), rehearsal=(2, 96, 5, 1, 16))
    document_BT = documents(rows, tokens)

    def packed(device: torch.device, dtype: torch.dtype) -> Visibility:
        visibility = within_documents(document_BT.to(device), dtype, width)
        uses_kernel = visibility.boundary is not None or device.type == "cpu"
        expect(uses_kernel, f"attention in {dtype} with {width} numbers a head did not take the variable-length kernel")
        return visibility

    for name, groups in (("heads", heads), ("groups", key_heads)):
        shape = (rows, tokens, heads, groups, width)
        _compare(probe, name, shape, HALF, packed, _masked(document_BT))

    # Layers with a sliding window take the same kernel.
    window, position_1T = tokens // 16, torch.arange(tokens)[None]

    def windowed(makes: VisibilityOf) -> VisibilityOf:
        def make(device: torch.device, dtype: torch.dtype) -> Visibility:
            shape = document_BT.shape
            return within_window(makes(device, dtype), window, position_1T.to(device), shape, dtype, width)

        return make

    shape = (rows, tokens, heads, key_heads, width)
    _compare(probe, "window", shape, HALF, windowed(packed), windowed(_masked(document_BT)))


def masks(probe: Probe) -> None:
    """Checks attention that PyTorch computes: causal (bf16), and with masks of documents (fp32) and of branches (bf16).

    Notes the errors of output and gradients.

    Raises:
        CheckFailedError: an error is above its limit.
    """
    rows, tokens, heads, width = probe.sized((2, 1024, 25, 64), rehearsal=(2, 64, 5, 16))
    shape = (rows, tokens, heads, heads, width)
    document_BT = documents(rows, tokens)
    branch_BT = documents(rows, tokens) % 3

    def causal(device: torch.device, dtype: torch.dtype) -> Visibility:
        return CAUSAL

    _compare(probe, "causal", shape, HALF, causal, causal)
    _compare(probe, "documents", shape, torch.float32, _masked(document_BT), _masked(document_BT))
    branches = _masked(document_BT // 3, branch_BT)
    _compare(probe, "branches", shape, HALF, branches, branches)


def documents(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Returns the document number of each token, for documents of random lengths: int64 (rows, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    # Eight documents a row on average.
    return (torch.rand(rows, tokens, generator=generator) < 8 / tokens).long().cumsum(1)


def _masked(document_BT: torch.Tensor, branch_BT: torch.Tensor | None = None) -> VisibilityOf:
    """Returns visibility as a mask on any device, because branches always need one."""
    branches = torch.zeros_like(document_BT)
    if branch_BT is not None:
        branches = branch_BT
    return lambda device, dtype: within_documents(
        document_BT.to(device), dtype, d_head=0, branch_BT=branches.to(device)
    )


def _compare(
    probe: Probe, name: str, shape: tuple[int, ...], dtype: torch.dtype, makes: VisibilityOf, reference: VisibilityOf
) -> None:
    """Compares output and gradients of `attend` on the device with a higher precision on the CPU, for equal inputs.

    Notes each largest error as a share of the largest value.

    Args:
        shape: (rows, tokens, query heads, key heads, numbers of a head).
        makes: visibility on the device.
        reference: visibility on the CPU.

    Raises:
        CheckFailedError: an error is above the limit of `dtype`.
    """
    # Inputs come from the CPU's generator, so that both devices have the same ones.
    rows, tokens, heads, groups, width = shape

    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(rows, tokens, n, width, generator=generator).to(dtype) for n in (heads, groups, groups)]
    weight = torch.randn(rows, tokens, heads, width, generator=generator).to(dtype)

    def run(device: torch.device, dtype: torch.dtype, makes: VisibilityOf) -> list[torch.Tensor]:
        leaves = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in inputs]
        q, k, v = leaves
        output = attend(q, k, v, makes(device, dtype))
        output.backward(weight.to(device, dtype))
        return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    # The reference has the same inputs, rounded to `dtype`, but computes in a higher precision.
    higher, limit = REFERENCES[dtype]
    measured = run(probe.world.device, dtype, makes)
    expected = run(torch.device("cpu"), higher, reference)

    for tensor_name, actual, reference_value in zip(
        ("output", "query", "key", "value"), measured, expected, strict=True
    ):
        error = float((actual.float().cpu() - reference_value).abs().max() / reference_value.abs().max())

        probe.note(f"{name}, {tensor_name} error", error)
        expect(error <= limit, f"{name}: error of {tensor_name} is {error:.2g} of the largest value, expected {limit}")


def bits(probe: Probe) -> None:
    """Checks that randomness, a function of keys, has the same bits on the device as on the CPU: dropout masks, eager
    and compiled, and the numbers that sampling draws.

    Raises:
        CheckFailedError: a bit differs.
    """
    device = probe.world.device
    cpu = torch.device("cpu")
    rows, tokens, width = probe.sized((2, 1024, 1600), rehearsal=(2, 32, 40))

    def masks_of(mask: Callable[..., torch.Tensor], device: torch.device) -> torch.Tensor:
        # A number beyond 32 bits, as in a long run.
        sequence_B = torch.tensor([5, (1 << 40) + 3], device=device)[:rows]
        key = DropoutKey(0.1, seed=7, step=123_456, sequence_B=sequence_B)
        sites = dropout_sites(key, 2, width)
        return torch.stack([mask(site, torch.arange(tokens, device=device)) for site in sites if site]).cpu()

    expected = masks_of(keep_mask, cpu)
    for name, function in (("eager", keep_mask), ("compiled", torch.compile(keep_mask))):
        masks = masks_of(function, device)
        expect(torch.equal(masks, expected), f"{name} dropout masks differ in {(masks != expected).sum()} places")

    # Seeds use all 64 bits, of which a device might lose the upper ones.
    position_N = torch.arange(4096)
    seed_N = position_N * 0x9E3779B97F4A7C1 - (1 << 62)
    drawn = uniform(seed_N.to(device), position_N.to(device)).cpu()
    expect(torch.equal(drawn, uniform(seed_N, position_N)), "sampling draws other numbers than on the CPU")


def compiled(probe: Probe) -> None:
    """Checks three training steps with dropout on packed documents in fp32, bf16, and bf16 compiled, then batches of
    other sizes in the compiled kernels.

    Notes relative errors of losses and of the first gradient norm, and the number of compiled graphs.

    Raises:
        CheckFailedError: an error is above its limit, or a loss is not finite.
        ConfigError: bf16 is asked for on a GPU without it.
        StrangerError: another user has connected to a port of this rank.
    """
    shape = ("model=medium", "model.n_layers=4", "stage.seq_len=1024")
    tiny = ("model=nano", "model.n_layers=2", "stage.seq_len=64", "model.vocab_size=512")

    losses: dict[str, list[float]] = {}
    norms: dict[str, float] = {}
    for name, compile_, dtype in (
        ("fp32", "never", "fp32"),
        ("eager", "never", "bf16"),
        ("compiled", "always", "bf16"),
    ):
        settings = (f"parallel.compile={compile_}", f"parallel.compute_dtype={dtype}", "stage.dropout=0.1")
        config = probe.config(*shape, *settings, "stage.lr=1e-3", tiny=tiny)
        training = Training(probe, config)

        results: list[StepResult] = [training.step(packed_batches(training, 2, 2)) for _ in range(3)]
        losses[name] = [result.loss for result in results]
        norms[name] = results[0].grad_norm

        # Other stages and last micro-batches have other sizes; they must not need new kernels without end.
        if name == "compiled":
            for size in (1, 3, 4, 5):
                training.step(packed_batches(training, 1, size))
        del training

    for name, reference, limit in (("eager", "fp32", 0.01), ("compiled", "fp32", 0.01), ("compiled", "eager", 0.005)):
        errors = [
            abs(loss / reference_loss - 1) for loss, reference_loss in zip(losses[name], losses[reference], strict=True)
        ]
        norm_error = abs(norms[name] / norms[reference] - 1)

        probe.note(f"{name} against {reference}, loss error", max(errors))
        probe.note(f"{name} against {reference}, gradient norm error", norm_error)
        expect(max(errors) <= limit, f"{name} losses {losses[name]} differ from {losses[reference]} of {reference}")
        expect(norm_error <= 5 * limit, f"{name} gradient norm {norms[name]}, of {reference} {norms[reference]}")
        expect(all(map(math.isfinite, losses[name])), f"{name} losses are not finite: {losses[name]}")

    probe.note("compiled graphs", counters["stats"]["unique_graphs"])


def packed_batches(training: Training, count: int, rows: int) -> list[Batch]:
    """Returns micro-batches of random tokens in documents of random lengths, on the CPU; the same for every call at one
    step.

    Args:
        count: number of micro-batches.
        rows: sequences of each.
    """
    config = training.config
    generator = torch.Generator().manual_seed(training.state.step)

    batches = []
    for index in range(count):
        shape = (rows, config.stage.seq_len)
        document_BT = documents(*shape, seed=training.state.step + 100 * index)

        # Positions restart at the first token of each document.
        first_BT = torch.ones_like(document_BT, dtype=torch.bool)
        first_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
        index_BT = torch.arange(shape[1]).expand(shape)
        position_BT = index_BT - (index_BT * first_BT).cummax(1).values

        plain = Batch.plain(torch.randint(0, config.model.vocab_size, shape, generator=generator))
        number_B = plain.sequence_B + rows * index
        batches.append(replace(plain, document_BT=document_BT, position_BT=position_BT, sequence_B=number_B))

    return batches

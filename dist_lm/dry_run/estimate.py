"""Estimates memory and work of a step by arithmetic: roughly, but thousands of layouts a second. Imports no torch.

`parallel=auto` compares layouts by these estimates; tests compare them with played steps.

Dimensions: B sequences and T tokens of a micro-batch, D d_model, H K width of queries, G K width of keys and F d_ff of
this rank.
"""

import math
from dataclasses import dataclass

from dist_lm.config.root import Config
from dist_lm.dry_run.work import WORLD, StepMemory, Work
from dist_lm.model.size import (
    attended_tokens,
    documents_apart,
    is_matrix,
    is_trained,
    neuron_shape,
    parameter_shapes,
    quantised_bytes,
)
from dist_lm.parallel.layout import (
    Layout,
    blocks_per_unit,
    distinct_placements,
    has_units_outside,
    keys_of,
    one_block,
    rank_slice,
    reshards,
)
from dist_lm.parallel.owners import heaviest_load, matrix_cuts, message_costs, sharing_pays

FP32_BYTES = 4
ELEMENTWISE_PASSES = 6  # passes of elementwise operations over the activations of a block

# Without and with a sharded vocabulary: passes over a block of fp32 logits, and peak bytes for each logit.
LOSS_PASSES = (10, 25)
LOSS_BYTES = (10.5, 15)

SLICE_PASSES = 6  # passes over the weights of a tensor-parallel rank, without matrix products
OWNER_PASSES = 60  # passes over the matrices of an owner, with the squares of Newton-Schulz
OPTIMIZER_PASSES = 9  # passes over each fp32 shard: scaling and norm of gradients, AdamW


@dataclass(frozen=True)
class Shapes:
    """The sizes behind an estimate; if tp shards a tensor, they count the part of one tensor-parallel rank."""

    own_elements: int  # elements of this rank's shards, matrices in four bits excluded
    own_trained: int  # elements of these shards that training changes, in blocks and outside
    own_matrices: int  # elements of these that belong to matrices inside blocks
    trained: int  # trained elements that a tensor-parallel rank computes with
    gathered_trained: int  # the same as FSDP gathers them, padding included
    quantised: int  # elements of matrices in four bits
    quantised_bytes: int  # bytes of these
    largest_quantised: int  # elements of the largest of these
    blocks: int  # elements of all blocks
    outside: int  # elements of embedding, head and final norm
    gathered_blocks: int  # elements of all blocks as FSDP gathers them, padding included
    gathered_outside: int  # elements outside blocks as FSDP gathers them, padding included
    head: int  # elements of the output head
    n_layers: int
    units: int  # groups of blocks that FSDP gathers together
    units_outside: int  # groups of parameters outside blocks that FSDP gathers together
    resharded: bool  # FSDP frees gathered blocks until the backward pass
    tokens: int  # tokens of a micro-batch that this rank holds
    micro_batches: int  # micro-batches of a rank in a step
    width: int  # D
    attention: int  # H K
    keys: int  # G K
    hidden: int  # F
    kept_hidden: int  # number of tensors of width F that a block keeps for the backward pass
    vocabulary: int  # rows of the vocabulary on this rank


def is_half(config: Config) -> bool:
    """Returns whether forward and backward pass compute in bf16 on `config.hardware`."""
    dtype = config.parallel.compute_dtype
    return dtype == "bf16" or (dtype in ("auto", "fastest") and config.hardware.device == "cuda")


def element_bytes(config: Config) -> int:
    """Returns the bytes of a number in the forward and backward pass."""
    return 2 if is_half(config) else FP32_BYTES


def micro_batches_of(config: Config, layout: Layout) -> tuple[int, int]:
    """Returns (micro-batches of a rank in a step, sequences of the largest one)."""
    sequences = max(1, config.stage.global_batch // layout.dp)
    size = min(config.stage.micro_batch, sequences)
    return -(-sequences // size), size


def offloads(config: Config) -> bool:
    """Returns whether parameters, gradients and optimizer state are in host memory."""
    return config.parallel.cpu_offload and config.hardware.device == "cuda"


def gradients_add_up(config: Config, layout: Layout) -> bool:
    """Returns whether a rank keeps unsharded gradients between micro-batches."""
    return micro_batches_of(config, layout)[0] > 1 and not config.parallel.reduce_every_micro_batch


def shapes_of(config: Config, layout: Layout) -> Shapes:
    """Returns the sizes of `config` on the fullest rank of `layout`: numbers of elements, of which only
    `quantised_bytes` is in bytes, and tokens of one micro-batch.
    """
    model = config.trained_shape
    size = element_bytes(config)
    block, outside = one_block(model, layout)

    trained = [named for named in distinct_placements(model, layout) if is_trained(named[0], model)]
    micro_batches, sequences = micro_batches_of(config, layout)
    vocabulary = rank_slice(model.vocab_size, layout.tp, 0).held

    own_block, own_outside = (sum(math.prod(part.local(layout)) for part in parts) for parts in (block, outside))
    own_elements = model.n_layers * own_block + own_outside
    quantised = []
    if model.is_in_4bit:
        quantised = [math.prod(shape) for name, shape in parameter_shapes(model).items() if is_matrix(name)]

    return Shapes(
        own_elements=own_elements - sum(quantised),
        own_trained=sum(times * math.prod(placement.local(layout)) for _, placement, times in trained),
        own_matrices=sum(
            times * math.prod(placement.local(layout)) for name, placement, times in trained if is_matrix(name)
        ),
        trained=sum(times * placement.whole(layout) for _, placement, times in trained),
        gathered_trained=sum(times * placement.gathered(layout) for _, placement, times in trained),
        quantised=sum(quantised),
        quantised_bytes=sum(quantised_bytes(n_entries) for n_entries in quantised),
        largest_quantised=max(quantised, default=0),
        blocks=model.n_layers * sum(placement.whole(layout) for placement in block),
        outside=sum(placement.whole(layout) for placement in outside),
        gathered_blocks=model.n_layers * sum(placement.gathered(layout) for placement in block),
        gathered_outside=sum(placement.gathered(layout) for placement in outside),
        head=vocabulary * model.d_model,
        n_layers=model.n_layers,
        units=-(-model.n_layers // blocks_per_unit(model, layout, size)),
        units_outside=1 + has_units_outside(model, layout, size),
        resharded=reshards(config.parallel.reshard_after_forward, model, layout, size),
        tokens=sequences * config.stage.seq_len // layout.cp,
        micro_batches=micro_batches,
        width=model.d_model,
        attention=rank_slice(model.n_heads, layout.tp, 0).held * model.d_head,
        keys=keys_of(model, layout.tp, 0)[0].held * model.d_head,
        hidden=rank_slice(model.d_ff, layout.tp, 0).held,
        kept_hidden=4 if model.is_gated else 2,
        vocabulary=vocabulary,
    )


def estimate_memory(config: Config, layout: Layout) -> StepMemory:
    """Returns the bytes of tensors on the fullest rank of `layout`.

    Its `peak` is that of a step, without the engine of stage rlhf. With parallel.cpu_offload, tensors in host memory
    are counted separately.

    Args:
        config: of a stage with sequences (seq_len, micro_batch, global_batch), or `iterations.update_of` one.
    """
    parallel = config.parallel
    shapes = shapes_of(config, layout)
    size = element_bytes(config)

    sharded = layout.reducing > 1 or size != FP32_BYTES
    # Gradients that add up over micro-batches stay unsharded until the last one.
    adds_up = gradients_add_up(config, layout)
    gradient_elements = shapes.own_trained
    if adds_up or not sharded:
        gradient_elements = shapes.trained

    gathered = 0
    if sharded:
        # Blocks that are freed after use need the memory of two: one computes while the next is gathered.
        in_blocks = shapes.gathered_blocks
        if shapes.resharded:
            in_blocks *= min(1, 2 / shapes.units)
        gathered = size * (shapes.gathered_outside + in_blocks)
    parameters = FP32_BYTES * shapes.own_elements
    if shapes.quantised:
        # FSDP holds what is trained alone, and one matrix at a time has its dtype again.
        gathered = size * (shapes.gathered_trained * sharded + shapes.largest_quantised)
        frozen = shapes.own_elements - shapes.own_trained
        parameters = FP32_BYTES * shapes.own_trained + size * frozen + shapes.quantised_bytes

    all_activations, kept_activations = _block_activations(config, layout, shapes, size)
    # A block is computed again, one after the other, unless it keeps all of its activations.
    block = all_activations * (parallel.activation_checkpointing != "none")

    chunk_tokens = _chunk(config, shapes)
    loss = chunk_tokens * shapes.vocabulary * LOSS_BYTES[layout.tp > 1]

    # A kernel for packed documents needs no mask.
    has_kernel = documents_apart(config.hardware.device, is_half(config), config.model.d_head)
    num_masks = len({*config.model.windows})  # layers with a window have another one
    mask = size * config.stage.seq_len * num_masks * (config.stage.document_mask and not has_kernel)
    stream = 4 * size * shapes.tokens * shapes.width + mask * shapes.tokens * layout.cp

    # The peak is between forward and backward pass, or at the end, when the gradients outside blocks are reduced.
    turning_point = gathered + shapes.n_layers * kept_activations + max(loss, block) + stream
    # Gloo needs one more.
    num_copies = 1 + (config.hardware.device != "cuda")
    reduced = 0
    if sharded and config.trained_shape.lora is None:
        reduced = shapes.gathered_outside / shapes.units_outside
    end = FP32_BYTES * reduced * num_copies + gathered + block + stream

    memory = StepMemory(
        parameters=parameters,
        gradients=FP32_BYTES * gradient_elements,
        optimizer=FP32_BYTES * _optimizer_state(config, shapes),
        activations=round(max(turning_point, end)),
    )

    return memory.offloaded(adds_up) if offloads(config) else memory


def _optimizer_state(config: Config, shapes: Shapes) -> int:
    """Returns the number of optimizer values (fp32, not bytes) on a rank: AdamW has two for each trained weight, Muon
    one for those of matrices, NorMuon one more for each neuron; an average of the weights is one more for each weight.
    """
    model = config.trained_shape
    muon = config.stage.muon

    # AdamW has two moments; an average of the weights is as large as one more.
    num_values = (2 + bool(config.stage.ema_decay)) * shapes.own_trained
    if not muon.is_on:
        return num_values

    num_values -= shapes.own_matrices

    if muon.variance_beta:
        trained = {name: shape for name, shape in parameter_shapes(model).items() if is_trained(name, model)}
        num_values += sum(math.prod(neuron_shape(name, shape)) for name, shape in trained.items() if is_matrix(name))

    return num_values


def _block_activations(config: Config, layout: Layout, shapes: Shapes, size: int) -> tuple[float, float]:
    """Returns bytes of activations of one block for a micro-batch: (needed by its backward pass, kept until then, which
    activation checkpointing makes fewer).

    Args:
        size: bytes of a number in the forward and backward pass.
    """
    parallel = config.parallel
    # With sp, a rank keeps its part of the residual stream; norms gather their output again.
    residual = shapes.width
    if parallel.sp:
        residual /= layout.tp
    inputs = 1 if config.model.parallel_residual else 2  # number of norm inputs

    # Queries, keys, values and the output of attention.
    attention = 2 * shapes.attention + 2 * shapes.keys
    # With cp, attention keeps what its rank got; with fewer key heads than ranks, every rank gets one.
    exchanged = 2 * shapes.attention + 2 * max(shapes.keys, layout.cp * config.model.d_head)
    needed = inputs * residual + 2 * shapes.width + shapes.attention + shapes.kept_hidden * shapes.hidden + exchanged
    if layout.cp > 1:
        needed += shapes.attention  # the output of attention before its exchange
    if config.model.qk_norm:
        # Queries and keys before their norm, and between norm and weight.
        needed += 2 * (shapes.attention + shapes.keys)
    if config.stage.dropout:
        needed += 2 * residual * (1 + 1 / size)

    # Selective checkpointing keeps what messages brought, beside the outputs of matrix products that they carried.
    messages = 0.0
    if layout.tp > 1:
        messages += 2 * shapes.width + 2 * shapes.width * parallel.sp
    if layout.cp > 1:
        messages += exchanged

    kept_elements = {
        "none": needed,
        # outputs of matrix products and attention
        "selective": 3 * residual + attention + (shapes.kept_hidden // 2) * shapes.hidden + messages,
        "full": residual,
    }[parallel.activation_checkpointing]

    return needed * size * shapes.tokens, kept_elements * size * shapes.tokens


def _chunk(config: Config, shapes: Shapes) -> int:
    """Returns the number of tokens whose logits exist at the same time."""
    return min(shapes.tokens, max(1, (config.parallel.loss_chunk_mib << 20) // (FP32_BYTES * shapes.vocabulary)))


def estimate_work(config: Config, layout: Layout) -> Work:
    """Returns the work of a step on the fullest rank of `layout`: FLOPs, device seconds without messages, and bytes and
    messages by axis. parallel.cpu_offload is left out."""
    parallel = config.parallel
    hardware = config.hardware
    shapes = shapes_of(config, layout)
    half = is_half(config)
    size = element_bytes(config)

    micro_batch = Work()

    # Matrix products: each forward pass, its two products in the backward pass, and what is computed again.
    recomputed = {"none": 0, "selective": 0, "full": 1}[parallel.activation_checkpointing]
    attention = shapes.tokens * shapes.attention * attended_tokens(config.model, config.stage.seq_len)
    attention *= _context_share(config, layout)
    # A loss in chunks computes its logits once more in the backward pass.
    head_passes = 3 + (_chunk(config, shapes) < shapes.tokens)
    # Weights of blocks without gradients.
    frozen = max(0, shapes.blocks - shapes.trained)

    micro_batch.operation(2 * shapes.tokens * (shapes.blocks * (3 + recomputed) - frozen), 0, hardware, half)
    micro_batch.operation(attention * (4 + 10 + 4 * recomputed), 0, hardware, half, is_attention=True)
    micro_batch.operation(2 * shapes.tokens * shapes.head * (head_passes - bool(frozen)), 0, hardware, half)

    # Elementwise operations, the loss, and with tp the slices of the weights are bound by memory.
    activations, _ = _block_activations(config, layout, shapes, size)
    recomputes = parallel.activation_checkpointing != "none"
    micro_batch.operation(0, activations * shapes.n_layers * (ELEMENTWISE_PASSES + 2 * recomputes), hardware, half)
    micro_batch.operation(
        0, shapes.tokens * shapes.vocabulary * FP32_BYTES * LOSS_PASSES[layout.tp > 1], hardware, half
    )
    if layout.tp > 1:
        micro_batch.operation(0, SLICE_PASSES * size * (shapes.blocks + shapes.outside), hardware, half)

    # Matrices in four bits are read, and written in the dtype of the pass, for each pass over their block.
    dequantisations = 2 + recomputes
    moved = dequantisations * (shapes.quantised_bytes + size * shapes.quantised)
    micro_batch.operation(0, moved, hardware, half)

    _tensor_parallel_messages(micro_batch, config, layout, shapes, size)
    _context_parallel_messages(micro_batch, config, layout, shapes, size)

    work = micro_batch * shapes.micro_batches

    # Parameters that stay gathered until the backward pass stay gathered until the last micro-batch.
    gathers = 1
    if shapes.resharded:
        gathers = 2 * shapes.micro_batches
    elements = gathers * shapes.gathered_blocks + shapes.gathered_outside
    if shapes.quantised:
        elements = shapes.gathered_trained
    messages = gathers * shapes.units + shapes.units_outside
    _spread(work, "all_gather", "dp_shard", layout.shards, size * elements, messages)
    # Copies out of the gathered buffer.
    if layout.reducing > 1:
        work.operation(0, 2 * size * elements, hardware, half)

    # Gradients are reduced after the last micro-batch, or after each one.
    reductions = shapes.micro_batches if parallel.reduce_every_micro_batch else 1
    gathered = FP32_BYTES * shapes.gathered_trained
    units = shapes.units + shapes.units_outside

    for _ in range(reductions):
        _spread(work, "reduce_scatter", "dp_shard", layout.shards, gathered, units)
        _spread(work, "all_reduce", "dp_replicate", layout.dp_replicate, FP32_BYTES * shapes.own_trained, units)
        work.operation(0, 2 * gathered, hardware, half)

    # Adding gradients of micro-batches, the optimizer, and the sum of losses and counts.
    work.operation(0, 3 * FP32_BYTES * shapes.trained * (shapes.micro_batches - 1), hardware, half)
    work.operation(0, OPTIMIZER_PASSES * FP32_BYTES * shapes.own_trained, hardware, half)
    work.collective("all_reduce", WORLD, layout.world_size, 8)
    if config.stage.muon.is_on:
        _muon(work, config, layout)

    return work


def _muon(work: Work, config: Config, layout: Layout) -> None:
    """Adds to `work` what the busiest owner of matrices does, by the rules of `parallel.owners`."""
    layout = layout.of_parameters
    is_gpu = config.hardware.device == "cuda"
    costs = message_costs(config.hardware.device)
    cuts = matrix_cuts(config.trained_shape, layout)
    if not cuts:
        return

    shares_replicas = sharing_pays(cuts, layout, costs.flops_per_entry)
    n_places = layout.dp_shard * layout.tp
    handing_on = costs.flops_per_entry if costs.hands_on else math.inf
    busiest = heaviest_load(cuts, layout.world_size if shares_replicas else n_places, handing_on)
    flops = busiest.flops if is_gpu else busiest.flops_of_squares
    work.operation(flops, OWNER_PASSES * costs.item_bytes * busiest.entries, config.hardware, is_gpu)

    # First stage, inside a replica: shards go to owners, and steps come back.
    n_buckets = math.ceil(busiest.entries / costs.bucket_entries) + busiest.n_more_buckets
    shard_entries = sum(cut.n_matrices * cut.matrix_size for cut in cuts) // n_places
    owners_here = layout.dp_replicate if shares_replicas else 1
    sent_bytes = costs.item_bytes * (shard_entries // owners_here + busiest.entries)
    if layout.tp == 1:
        _spread(work, "all_to_all", "dp_shard", layout.dp_shard, sent_bytes, 2 * n_buckets)
    elif layout.dp_shard == 1:
        _spread(work, "all_to_all", "tp", layout.tp, sent_bytes, 2 * n_buckets)
    else:
        _spread(work, "all_to_all", WORLD, layout.world_size, sent_bytes, 2 * n_buckets)

    # Second stage: every rank passes on the parts that it got to its copies in other replicas. The parts of all
    # replicas are as long as the longest one.
    if shares_replicas:
        longest_part = heaviest_load(cuts, layout.dp_replicate).entries // n_places
        gathered_bytes = costs.item_bytes * longest_part * layout.dp_replicate
        _spread(work, "all_gather", "dp_replicate", layout.dp_replicate, gathered_bytes, n_buckets)


def _tensor_parallel_messages(work: Work, config: Config, layout: Layout, shapes: Shapes, size: int) -> None:
    """Adds to `work` the messages of tensor parallelism of one micro-batch; none with tp 1.

    Args:
        size: bytes of a number in the forward and backward pass.
    """
    parallel, layers = config.parallel, shapes.n_layers

    stream = size * shapes.tokens * shapes.width
    # Two regions for each block, forward and backward, and two more with full recomputation; embedding and input of
    # the head.
    regions = layers * (4 + 2 * (parallel.activation_checkpointing == "full")) + 2

    if parallel.sp:
        work.collective("all_gather", "tp", layout.tp, stream, regions)
        work.collective("reduce_scatter", "tp", layout.tp, stream, regions)
    else:
        work.collective("all_reduce", "tp", layout.tp, stream, regions)


def _context_share(config: Config, layout: Layout) -> float:
    """Returns the attention that the rank of a cp group with most heads computes, per attention of an even share."""
    heads = rank_slice(config.model.n_heads, layout.tp, 0).held
    return -(-heads // layout.cp) * layout.cp / heads


def _context_parallel_messages(work: Work, config: Config, layout: Layout, shapes: Shapes, size: int) -> None:
    """Adds to `work` the exchanges of tokens for heads around attention of one micro-batch, and the copies that they
    need; nothing with cp 1.

    Args:
        size: bytes of a number in the forward and backward pass.
    """
    if layout.cp == 1:
        return

    # With fewer key heads than ranks, every rank gets one.
    keys = max(shapes.keys, layout.cp * config.model.d_head)
    passes = 2 + (config.parallel.activation_checkpointing == "full")
    exchanged = [(2, shapes.attention), (2, keys)]  # queries and outputs, keys and values
    for n_tensors, width in exchanged:
        times = n_tensors * passes * shapes.n_layers
        work.collective("all_to_all", "cp", layout.cp, size * shapes.tokens * width, times)
        # Heads are copied to the front, and back.
        work.operation(0, 4 * times * size * shapes.tokens * width, config.hardware, size != FP32_BYTES)


def _spread(work: Work, kind: str, axis: str, ranks: int, size: float, messages: int) -> None:
    work.collective(kind, axis, ranks, round(size / messages), messages)
